"""What the commands ask of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Optional

from mindspore import nn

from ..config import Config
from ..data import ImageDataset, TrainLoader
from ..distributed import World
from ..evaluation import Evaluator, Metric
from ..weights import Weights


class Task(ABC):
    """A configuration's data, network, loss and metric; what comes later builds on what came before.

    Attributes:
        metric: what evaluations measure.
        train_set, val_set: the images, from `open_data` on; no val_set: the run does not evaluate.
    """

    metric: Metric
    train_set: ImageDataset
    val_set: Optional[ImageDataset] = None

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world

    @property
    @abstractmethod
    def measure(self) -> str:
        """What the training loss is, in words."""

    @abstractmethod
    def open_data(self, validation: bool) -> None:
        """Opens the training images, and those for validation where they are asked for; the same on all ranks.

        Raises:
            DataError: something is missing or not what it should be.
            ConfigError: the data does not fit the configuration.
        """

    @abstractmethod
    def fit_weights(self, weights: Optional[Weights]) -> Optional[Weights]:
        """Initial weights for the classes of the data: where they are others, with a new classifier."""

    @abstractmethod
    def build_network(self, weights: Optional[Weights], record: dict[str, Any]) -> nn.Cell:
        """The network to train.

        Args:
            record: of the weights, or of the checkpoint from which a run resumes.

        Raises:
            ConfigError: the network cannot be trained so.
        """

    @abstractmethod
    def loss(self) -> Optional[nn.Cell]:
        """The loss of logits and labels; None: the network's own `losses`."""

    @abstractmethod
    def train_loader(self, network: nn.Cell) -> TrainLoader:
        """This rank's training batches for the network."""

    @abstractmethod
    def evaluator(self, network: nn.Cell) -> Optional[Evaluator]:
        """What evaluates weights of the network on the validation images; None without such images."""

    @abstractmethod
    def record(self, network: nn.Cell) -> dict[str, Any]:
        """What a checkpoint says of itself (as `mindska.weights.Weights.record`)."""
