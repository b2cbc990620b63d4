"""Images in folders or CIFAR files -> batches, with the authors' pixels."""

from ..errors import DataError
from .class_order import natural_order
from .comparison import check_same_classes, check_same_on_all_ranks
from .datasets import open_dataset
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
    "check_same_on_all_ranks",
    "natural_order",
    "open_dataset",
]
