"""Images in folders or CIFAR files -> batches, with the authors' pixels."""

from .datasets import DataError, check_same_classes, open_dataset
from .loader import EvalLoader, TrainLoader
from .transforms import Augmentation, EvalTransform, Preprocessing, TrainTransform

__all__ = [
    "Augmentation",
    "DataError",
    "EvalLoader",
    "EvalTransform",
    "Preprocessing",
    "TrainLoader",
    "TrainTransform",
    "check_same_classes",
    "open_dataset",
]
