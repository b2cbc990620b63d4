"""Segmentation as a task: training, validation and prediction."""

from .task import Segmentation
from .validation import validate

__all__ = ["Segmentation", "validate"]
