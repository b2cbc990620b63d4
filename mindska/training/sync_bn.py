"""Batch norms whose statistics are those of all ranks' images."""

from __future__ import annotations

import logging

from mindspore import nn

log = logging.getLogger("mindska")


def synchronise(network: nn.Cell, world_size: int) -> None:
    """Makes every nn.BatchNorm2d of a network an nn.SyncBatchNorm, in place: parameters, names and order stay.

    On one rank there is nothing to synchronise, and nothing changes.
    """
    if world_size == 1:
        log.info("sync_bn has no effect on one process")
        return
    norms = [cell for _, cell in network.cells_and_names() if type(cell) is nn.BatchNorm2d]
    for cell in norms:
        synchronised = nn.SyncBatchNorm(cell.num_features, cell.eps, 1 - cell.momentum)  # its momentum is the other's
        cell.__class__ = nn.SyncBatchNorm
        for name in ("bn_train", "is_global", "group_name", "process_groups", "rank_id", "rank_size"):
            setattr(cell, name, getattr(synchronised, name))
    log.info("sync_bn: %d batch norms take the statistics of %d processes", len(norms), world_size)
