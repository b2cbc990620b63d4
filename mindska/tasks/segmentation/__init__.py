"""Segmentation as a task: training, validation and prediction."""

from .prediction import SegmentationPredictor, predict_images
from .task import Segmentation
from .validation import validate

__all__ = ["Segmentation", "SegmentationPredictor", "predict_images", "validate"]
