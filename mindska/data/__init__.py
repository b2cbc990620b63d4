"""Images in folders, lists, tar or CIFAR files -> batches, with the authors' pixels."""

from ..errors import DataError
from .base import ImageDataset
from .class_order import natural_order
from .comparison import check_same_classes, check_same_on_all_ranks
from .datasets import open_dataset
from .lists import write_list
from .loader import EvalLoader, TrainLoader
from .splits import split_by_ratio
from .transforms import Augmentation, EvalTransform, Preprocessing, TrainTransform

__all__ = [
    "Augmentation",
    "DataError",
    "EvalLoader",
    "EvalTransform",
    "ImageDataset",
    "Preprocessing",
    "TrainLoader",
    "TrainTransform",
    "check_same_classes",
    "check_same_on_all_ranks",
    "natural_order",
    "open_dataset",
    "split_by_ratio",
    "write_list",
]
