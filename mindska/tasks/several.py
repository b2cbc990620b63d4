"""Several checkpoints, evaluated one after the other."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Callable, Optional

from ..config import Config
from ..data.lists import write_table
from ..distributed import World, all_gather_object
from ..errors import DataError, RunError, UserError, few, printable

log = logging.getLogger("mindska")


def validate_each(
    config: Config, world: World, prepare: Callable[[Config], Any], evaluate: Callable[[Any], dict[str, Any]]
) -> None:
    """Prepares and evaluates every checkpoint that the configuration names; every rank must call it.

    Args:
        prepare: opens a checkpoint and its data. evaluate: what it gave -> a row of results.

    Raises:
        UserError: a checkpoint or the data cannot be used. Of several checkpoints the others are evaluated first.
    """
    paths = [config.ckpt_path, *config.more_ckpt_paths]
    rows: list[dict[str, Any]] = []
    failed = []
    for path in paths:
        error: Optional[UserError] = None
        prepared: Any = None
        try:
            prepared = prepare(dataclasses.replace(config, ckpt_path=path, more_ckpt_paths=()))
        except UserError as raised:
            if len(paths) == 1 or isinstance(raised, DataError):  # without images there is nothing to go on with
                raise
            error = raised
        said = next((each for each in all_gather_object(error and str(error)) if each), None)
        if said is None:
            rows.append(evaluate(prepared))
        else:
            rows.append(dict(ckpt_path=path, error=said))
            failed.append(path)
            log.error("error: %s: %s", printable(path), said)
        if config.result_csv and world.rank == 0:  # at once: what is done is there if the rest fails
            header = list(dict.fromkeys(name for row in rows for name in row if name != "error")) + ["error"]
            write_table(Path(config.result_csv), header, ([row.get(name, "") for name in header] for row in rows))
    if failed:
        raise RunError(f"{len(failed)} of {len(paths)} checkpoints could not be evaluated: {few(failed)}")
