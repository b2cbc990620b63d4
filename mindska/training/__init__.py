"""Training: one step as a graph, the loop around it, and what a checkpoint holds."""

from ..errors import RunError
from .loop import Trainer
from .optim import build_optimizer, learning_rates
from .resume import resumed_record
from .step import StepOptions, TrainStep

__all__ = ["RunError", "StepOptions", "TrainStep", "Trainer", "build_optimizer", "resumed_record", "learning_rates"]
