"""Detection as a task: training, validation and prediction."""

from .prediction import DetectionPredictor, predict_images
from .task import Detection
from .validation import validate

__all__ = ["Detection", "DetectionPredictor", "predict_images", "validate"]
