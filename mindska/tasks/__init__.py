"""What networks are trained for: a task is one object that knows its data, network, loss and metric.

The trainer, the commands and the records know none of them by name.
"""

from ..config import Config
from ..distributed import World
from .base import Task
from .classification import Classification
from .segmentation import Segmentation

__all__ = ["Classification", "Segmentation", "Task", "create_task"]

TASKS: dict[str, type[Task]] = {"classification": Classification, "segmentation": Segmentation}


def create_task(config: Config, world: World) -> Task:
    """The task that the configuration names, or that its model is for."""
    return TASKS[config.task or ""](config, world)
