"""What networks are trained for: a task is one object that knows its data, network, loss and metric.

The trainer, the commands and the records know none of them by name.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import validation
from ..config import Config
from ..distributed import World
from ..errors import SettingError
from ..export import read_model_record
from ..names import task_of
from ..prediction import is_exported
from ..weights.source import open_source
from .base import Task
from .classification import Classification
from .classification import predict_images as predict_classes
from .detection import Detection
from .detection import predict_images as predict_objects
from .detection import validate as validate_detection
from .segmentation import Segmentation
from .segmentation import predict_images as predict_segmentation
from .segmentation import validate as validate_segmentation

__all__ = [
    "Classification",
    "Detection",
    "Segmentation",
    "Task",
    "create_task",
    "predict_images",
    "task_of_file",
    "validate",
]

TASKS: dict[str, type[Task]] = {"classification": Classification, "segmentation": Segmentation, "detection": Detection}


def create_task(config: Config, world: World) -> Task:
    """The task that the configuration names, or that its model is for."""
    return TASKS[config.task or ""](config, world)


# What only some models can be told in prediction.
OF_CLASSIFIERS, OF_OTHERS = ("contact_sheet",), ("out", "flip", "slide_stride", "score_threshold")


def task_of_file(path: str, model: str = "") -> str:
    """The task of the model that a file of weights or an exported model names; `model`: of a file that names none.

    Raises:
        UserError: the file is missing or is none of these.
    """
    record = read_model_record(Path(path)) if is_exported(path) else open_source(path).record
    return str(record.get("task") or task_of(record.get("model") or model))


def validate(config: Config, world: World) -> None:
    """Evaluates the checkpoints that the configuration names, which are of one task; every rank must call it.

    Raises:
        UserError: a checkpoint or the data cannot be used.
    """
    task = config.task if config.model else task_of_file(config.ckpt_path)
    config.check_task(task or "")
    dict(classification=validation.validate, segmentation=validate_segmentation, detection=validate_detection)[
        task or ""
    ](config, world)


def predict_images(options: Any, paths: Sequence[str]) -> Iterator[Any]:
    """What `mindska predict` finds in image files, in their order; options: of the command.

    Raises:
        UserError: the model cannot be used, or nothing can be written.
    """
    task = task_of_file(str(options.ckpt_path), options.model)
    for name in OF_CLASSIFIERS if task != "classification" else OF_OTHERS:
        if getattr(options, name):
            raise SettingError(f"--{name} has no meaning for {options.ckpt_path}, a model for {task}; leave it out")
    return dict(classification=predict_classes, segmentation=predict_segmentation, detection=predict_objects)[task](
        options, paths
    )
