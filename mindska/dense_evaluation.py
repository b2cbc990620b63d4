"""Evaluation of images of many sizes, every one exactly once over all ranks.

A graph is compiled for one size. So images of the commonest sizes are evaluated in graph mode, in batches, and the
others one by one in PyNative mode. Which these are follows from the data set alone: figures do not depend on the number
of ranks.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Callable, Optional

import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from .compile_cache import compile_cached
from .data.loader import in_parallel
from .distributed import all_reduce_sum
from .errors import DataError
from .modes import pynative_mode
from .streams import unfailing_stderr

GRAPHS = 4  # sizes of input that are compiled
COMMON = 0.05  # share of the images that a size must have to be compiled

Size = tuple[int, int]  # height, width


def common_sizes(sizes: Sequence[Size], least: float) -> list[Size]:
    """The commonest sizes, at most `GRAPHS`, of those that come at least so often."""
    counted = sorted(Counter(sizes).items(), key=lambda item: (-item[1], item[0]))[:GRAPHS]
    return [size for size, count in counted if count >= least]


class Runner:
    """A network as a function of images; in graph mode, those of other sizes than some run in PyNative mode.

    Args:
        call: what is done with the images, (network, images) -> result, within the right mode.
        sizes: (height, width) of the inputs that are compiled. options: for the cache of graphs, see `compile_cached`.
    """

    def __init__(
        self, network: nn.Cell, call: Callable[..., Any], sizes: Collection[Size] = (), options: Any = None
    ) -> None:
        self.network, self.call, self.sizes, self.options = network, call, set(sizes), options
        self.compiled: set[tuple[int, ...]] = set()

    def compile(self, images: Tensor, on_signal: Optional[Callable[[int], None]] = None) -> None:
        """Compiles the network for images of this shape; see `compile_cached` for `on_signal`."""
        if images.shape not in self.compiled:
            what = "the network for evaluation"
            compile_cached(self.network, images, options=self.options, what=what, on_signal=on_signal)
            self.compiled.add(images.shape)

    def __call__(self, images: np.ndarray, *more: Any) -> Any:
        tensor, listed = Tensor(images), images.shape[2:] in self.sizes
        if listed:
            self.compile(tensor)
        with contextlib.nullcontext() if listed else pynative_mode():
            return self.call(self.network, tensor, *more)


class DenseEvaluator(ABC):
    """What evaluators of segmenters and detectors have in common; see `mindska.evaluation.Evaluator`.

    Args:
        network: what weights are put into; None: `runner` is set by the caller.
        batch_size: images of one size that the network sees at once.
        rank, world_size: this rank takes every world_size-th image of each size.

    Attributes:
        runner: a `Runner`, or what is like one.
    """

    def __init__(
        self, network: Optional[nn.Cell], dataset: Any, batch_size: int, rank: int, world_size: int, num_workers: int
    ) -> None:
        self.network, self.dataset, self.batch_size = network, dataset, batch_size
        self.rank, self.world_size, self.workers = rank, world_size, num_workers
        self.runner: Any = None

    @abstractmethod
    def sizes(self) -> Sequence[Size]:
        """(height, width) that the network sees of each image."""

    @abstractmethod
    def load(self, index: int) -> Any:
        """Image `index`, for `see`.

        Raises:
            DataError: it cannot be read.
        """

    @abstractmethod
    def see(self, images: list[Any]) -> Iterator[Any]:
        """What the network finds in each of some images, which `load` gave: of one size that is compiled, or one."""

    @abstractmethod
    def call(self, network: nn.Cell, images: Tensor, *more: Any) -> Any:
        """What the runner does with images."""

    def graph_sizes(self) -> list[Size]:
        """The sizes for which the network is compiled: the commonest ones."""
        return common_sizes(self.sizes(), COMMON * len(self.dataset))

    def groups(self) -> list[list[int]]:
        """This rank's images, in groups that the network sees at once: of one size that is compiled, or single ones."""
        compiled = set(self.graph_sizes())
        by_size: dict[Optional[Size], list[int]] = {}
        for index, size in enumerate(self.sizes()):
            by_size.setdefault(size if size in compiled else None, []).append(index)
        groups = []
        for group, indices in by_size.items():
            ours, step = indices[self.rank :: self.world_size], 1 if group is None else self.batch_size
            groups += [ours[i : i + step] for i in range(0, len(ours), step)]
        return groups

    def filled(self, pixels: np.ndarray) -> np.ndarray:
        """A batch, with zeros up to the batch size where its size is compiled: every other number would be a graph."""
        missing = self.batch_size - len(pixels)
        if missing <= 0 or pixels.shape[2:] not in self.runner.sizes:
            return pixels
        return np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), np.float32)])

    def make_runner(self, options: Any) -> None:
        """Makes the runner, where there is none yet."""
        if self.runner is None:
            assert self.network is not None
            self.runner = Runner(self.network, self.call, self.graph_sizes(), options)

    def compile_for(self, channels: int, options: Any, on_signal: Callable[[int], None]) -> None:
        """Compiles the network for all sizes that are; see `compile_cached` for `on_signal`."""
        self.make_runner(options)
        for size in sorted(self.runner.sizes):
            self.runner.compile(Tensor(np.zeros((self.batch_size, channels, *size), np.float32)), on_signal)

    def visit(
        self,
        weights: Sequence[Callable[[], None]],
        note: Callable[[int, int, Any, Any], None],
        options: Any,
        progress: bool,
    ) -> None:
        """Has the network see every image of this rank with each of some weights; images are read once.

        Args:
            note: called with (number of the weights, number of the image, what was found, what `load` gave).
            progress: show a bar.

        Raises:
            DataError: an image cannot be read, on this rank or another.
        """
        self.make_runner(options)
        order, inside = list(range(len(weights))), None
        error: Optional[DataError] = None
        groups = self.groups()
        shown = tqdm(
            total=sum(map(len, groups)), unit="image", file=unfailing_stderr(), disable=None if progress else True
        )

        def collate(indices: Sequence[int], samples: list[Any]) -> tuple[Sequence[int], list[Any]]:
            return indices, samples

        try:
            for indices, samples in in_parallel(self.load, groups, collate, self.workers):
                for kind in order:
                    if kind != inside:
                        weights[kind]()
                        inside = kind
                    for index, found, sample in zip(indices, self.see(samples), samples):
                        note(kind, index, found, sample)
                order.reverse()  # the last weights are in the network: they come first in the next batch
                shown.update(len(samples))
        except DataError as raised:
            error = raised
        shown.close()
        if all_reduce_sum(np.array([float(error is not None)]))[0]:  # all ranks end: none waits for another
            raise error or DataError("Another rank cannot read an image of the validation set; see its message")
