"""What `mindska analyze` does, an analysis a name."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Iterator

from ..config import Config
from ..distributed import World
from ..errors import ConfigError
from ..tasks import task_of_file
from . import attention, cam, confusion, neighbours, receptive_field, shape_bias
from .opening import Subject, initial_subject, one_process, open_subject


def analyse(name: str, config: Config, options: Namespace, world: World) -> Iterator[str]:
    """Does one analysis, writes its pictures and tables, and yields what it says.

    Args:
        options: of the command.

    Raises:
        UserError: the checkpoint, the data or the options cannot be used.
    """
    one_process(world)
    out, ending = options.out, options.format
    if name in ("confusion", "errors", "shape_bias"):
        task = task_of_file(config.ckpt_path, config.model)
        if name != "confusion" and task != "classification":
            raise ConfigError(f"{name} is of classifiers; {config.ckpt_path} is for {task}")
        if task == "detection":
            raise ConfigError(
                f"confusion is of classifiers and segmenters; {config.ckpt_path} is for detection, whose objects are "
                f"matched by boxes. `mindska validate --class_csv FILE` gives the figures of each class"
            )
        if name == "confusion":
            return confusion.write_confusion(out, config, world, task == "segmentation", ending)
        if name == "errors":
            return confusion.write_errors(out, config, world, options.number)
        return shape_bias.write(out, config, ending)
    if name == "receptive_field":
        return receptive_field.write(
            out, _subjects(config, options), options.images, options.number, options.stage, ending
        )
    subject = open_subject(config, plain=name != "attention")
    if name == "attention":
        return attention.write(out, subject, options.scales, options.images, options.number, ending)
    if name == "cam":
        chosen = (options.stages, options.method, options.target)
        return cam.write(out, subject, *chosen, options.images, options.number, ending)
    return neighbours.write(out, subject, options.nodes, options.images, options.number, ending)


def _subjects(config: Config, options: Namespace) -> Iterator[Subject]:
    """The networks of the checkpoints, then those with initial weights."""
    for path in filter(None, (config.ckpt_path, *config.more_ckpt_paths)):
        yield open_subject(dataclasses.replace(config, ckpt_path=path, more_ckpt_paths=()))
    for name in options.models:
        yield initial_subject(dataclasses.replace(config, ckpt_path="", more_ckpt_paths=(), model=name, task=None))
