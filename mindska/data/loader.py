"""Batches for training and evaluation.

A training sample is a pure function of (seed, epoch, position in the epoch): not of the order in which workers finish,
nor of how many workers or ranks there are, nor of where a run was resumed. Workers are threads: Pillow decodes and
resizes without holding Python's lock.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, Callable, Optional, Protocol, TypeVar

import numpy as np

from ..distributed.cores import share_of_cores
from ..errors import DataError
from .datasets import Dataset
from .mixing import Mixing
from .transforms import EvalTransform, Preprocessing

if TYPE_CHECKING:
    from mindspore.dataset import GeneratorDataset

log = logging.getLogger("mindska")

PREFETCHED_BATCHES = 3
REPLACEMENTS = 20  # images that are tried in the place of an unreadable one
ORDER, SAMPLE, NOISE, MIXING, REPLACEMENT = range(5)  # the streams of random numbers, kept apart

Batch = tuple[np.ndarray, ...]  # the transform's columns (images, labels), noise
Id = TypeVar("Id")
Sample = TypeVar("Sample")
Whole = TypeVar("Whole")


class SampleTransform(Protocol):
    """What makes training samples of a data set's images.

    Attributes:
        columns: what the arrays of a sample are called. preprocessing: what the network expects of an image.
    """

    columns: tuple[str, ...]
    preprocessing: Preprocessing

    def sample(self, dataset: Any, index: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """The arrays of a sample of image `index`, each of the same shape for all; all that is random comes from `rng`.

        Raises:
            DataError: the image cannot be used.
        """


def default_workers() -> int:
    """One worker a core that this process may use, at least two."""
    return max(2, share_of_cores(1))


def in_parallel(
    make: Callable[[Id], Sample],
    batches: Iterable[Sequence[Id]],
    collate: Callable[[Sequence[Id], list[Sample]], Whole],
    workers: int,
) -> Iterator[Whole]:
    """Yields collate(ids, [make(id) for id in ids]) for each list of ids, in order, a few batches ahead."""

    def assemble(ids: Sequence[Id], samples: list[Future[Sample]]) -> Whole:
        return collate(ids, [sample.result() for sample in samples])

    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    assembler = ThreadPoolExecutor(1, thread_name_prefix="batch")
    pending: deque[Future[Whole]] = deque()
    try:
        for ids in batches:
            pending.append(assembler.submit(assemble, ids, [pool.submit(make, i) for i in ids]))
            if len(pending) > PREFETCHED_BATCHES:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        assembler.shutdown(wait=False, cancel_futures=True)


class Damaged:
    """The unreadable images that a loader has met: path -> reason. Each is reported once."""

    def __init__(self, consequence: str, allowed: int, total: int) -> None:
        self.reasons: dict[str, str] = {}
        self.consequence, self.allowed, self.total = consequence, allowed, total
        self.lock = threading.Lock()

    def note(self, path: str, error: DataError) -> None:
        """Counts an image; DataError when there are more than are allowed, or none can take its place."""
        if not error.replaceable:
            raise error
        with self.lock:
            if path in self.reasons:
                return
            self.reasons[path] = str(error)
            log.warning("%s (%s; %d so far)", error, self.consequence, len(self.reasons))
            if len(self.reasons) > self.allowed:
                names = "".join(f"\n  {reason}" for reason in list(self.reasons.values())[:10])
                raise DataError(
                    f"{len(self.reasons)} of {self.total} training images cannot be read, more than the {self.allowed} "
                    f"that max_damaged allows:{names}\nMend or remove them, or raise max_damaged."
                )


class TrainLoader:
    """This rank's training batches, from any step of the run on.

    Args:
        dataset: the training images.
        transform: `sample(dataset, index, rng)` makes the arrays of a sample; `columns` names them.
        batch_size: images per batch of this rank.
        rank, world_size: this rank takes every world_size-th position of an epoch, so that the batches of all ranks
            together hold the same samples whatever the number of ranks.
        seed: of order, augmentation, noise and mixing.
        num_workers: threads; default: one a core.
        num_classes: length of soft labels.
        max_damaged: share of the images that may be unreadable; others, drawn at random, replace them.
        noise_size: how many uniform numbers each sample brings for the network's stochastic layers.
        aug_repeats: copies of each image in an epoch (repeated augmentation, Hoffer et al., 2020); an epoch keeps its
            length, so only a part of the images appears in it.
        mixup, cutmix, cutmix_prob, mixup_switch_prob: mixing of the samples of this rank's batch; see `Mixing`. With it
            the batches do depend on the number of ranks: a sample's partner is one of its own rank.
        mixup_off_epoch: epochs after which nothing is mixed any more; 0: never.
        buckets: of each image, which of several sizes its sample has: all samples of a global batch have the same.
            What is left over of each at the end of an epoch is left out.
        sampler: "random", every image once an epoch; "balanced", as many samples of each class (one more or less): an
            epoch keeps its length, so that images of small classes come several times, and a part of the large ones.

    Raises:
        DataError: there are fewer images than a global batch takes.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: SampleTransform,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        num_workers: Optional[int] = None,
        num_classes: Optional[int] = None,
        max_damaged: float = 0.0,
        noise_size: int = 0,
        aug_repeats: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        cutmix_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        mixup_off_epoch: int = 0,
        sampler: str = "random",
        buckets: Optional[Sequence[Any]] = None,
    ) -> None:
        self.dataset, self.transform, self.batch_size = dataset, transform, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.workers = num_workers or default_workers()
        self.noise_size, self.aug_repeats = noise_size, aug_repeats
        known = {bucket: number for number, bucket in enumerate(dict.fromkeys(buckets or ()))}
        self.buckets = np.asarray([known[bucket] for bucket in buckets]) if buckets and len(known) > 1 else None
        whole = batch_size * world_size
        counts = [len(dataset)] if self.buckets is None else np.bincount(self.buckets)
        self.steps_per_epoch = sum(int(count) // whole for count in counts)
        if self.steps_per_epoch == 0:
            sizes = "" if self.buckets is None else f" of {len(counts)} sizes, {max(counts)} of the commonest one"
            raise DataError(
                f"The training set has {len(dataset)} images{sizes}, fewer than one global batch of {whole} "
                f"({world_size} ranks of {batch_size}); lower batch_size"
            )
        self.damaged = Damaged("replaced by another image", int(max_damaged * len(dataset)), len(dataset))
        self.sampler, self.mixup_off_epoch = sampler, mixup_off_epoch
        self.mixing = None
        if mixup > 0 or cutmix > 0:
            classes = num_classes or len(dataset.class_names)
            self.mixing = Mixing(classes, mixup, cutmix, cutmix_prob, mixup_switch_prob)

    def order(self, epoch: int) -> np.ndarray:
        """The image at each position of an epoch, over all ranks."""
        rng = np.random.default_rng([self.seed, ORDER, epoch])
        shuffled = self._balanced(rng) if self.sampler == "balanced" else rng.permutation(len(self.dataset))
        if self.aug_repeats > 1:
            # Copies are neighbours, and so on different ranks, as in MindCV's RepeatAugSampler.
            shuffled = np.repeat(shuffled, self.aug_repeats)[: len(self.dataset)]
        return shuffled if self.buckets is None else self._in_buckets(shuffled, rng)

    def _in_buckets(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Whole global batches of one bucket each, in random order."""
        whole, batches = self.batch_size * self.world_size, []
        assert self.buckets is not None
        for bucket in range(self.buckets.max() + 1):
            own = order[self.buckets[order] == bucket]
            batches += np.split(own[: len(own) // whole * whole], len(own) // whole) if len(own) >= whole else []
        return np.concatenate([batches[i] for i in rng.permutation(len(batches))])

    def _balanced(self, rng: np.random.Generator) -> np.ndarray:
        """As many positions of an epoch for each class, and as many of those for each image of a class."""
        labels = np.asarray(self.dataset.labels)
        classes = rng.permutation(np.unique(labels))  # the first ones get the positions that are left over
        sampled = rng.permutation(np.resize(classes, len(labels)))
        order = np.empty(len(labels), np.int64)
        for label in classes:
            places, images = np.flatnonzero(sampled == label), np.flatnonzero(labels == label)
            rounds = [rng.permutation(images) for _ in range(-(-len(places) // len(images)))]
            order[places] = np.concatenate(rounds)[: len(places)] if rounds else []
        return order

    def _positions(self, start_step: int) -> Iterator[list[tuple[int, int, int]]]:
        """For each step from `start_step` on: this rank's (epoch, position, image)."""
        epoch, step = divmod(start_step, self.steps_per_epoch)
        while True:
            order = self.order(epoch)
            for current in range(step, self.steps_per_epoch):
                first = current * self.batch_size * self.world_size + self.rank
                positions = range(first, first + self.batch_size * self.world_size, self.world_size)
                yield [(epoch, position, int(order[position])) for position in positions]
            epoch, step = epoch + 1, 0

    def _sample(self, where: tuple[int, int, int]) -> tuple[np.ndarray, ...]:
        epoch, position, index = where
        noise = np.random.default_rng([self.seed, NOISE, epoch, position]).random(self.noise_size, np.float32)
        others = None
        for _ in range(REPLACEMENTS):
            try:
                rng = np.random.default_rng([self.seed, SAMPLE, epoch, position])
                return (*self.transform.sample(self.dataset, index, rng), noise)
            except DataError as error:
                if not error.replaceable:
                    raise
                self.damaged.note(self.dataset.describe(index), error)
            others = others or np.random.default_rng([self.seed, REPLACEMENT, epoch, position])
            index = int(others.integers(len(self.dataset)))
        raise DataError(f"{REPLACEMENTS} training images in a row cannot be read; is the data folder still there?")

    def _collate(self, ids: Sequence[tuple[int, int, int]], samples: list[tuple]) -> Batch:
        columns = tuple(np.stack(column) for column in zip(*samples))
        if self.mixing is not None:
            images, labels, noise = columns
            epoch, position, _ = ids[0]
            rng = np.random.default_rng([self.seed, MIXING, epoch, position])
            off = 0 < self.mixup_off_epoch <= epoch
            return (*self.mixing(images, labels, rng, off), noise)
        return columns

    def batches(self, start_step: int = 0, steps: Optional[int] = None) -> Iterator[Batch]:
        """Batches of the steps `start_step`, ... of the run (`steps` of them; None: without end).

        Yields:
            the transform's columns: images (B, C, H, W) float32; labels (B,) int32, or (B, num_classes) float32 when
            samples are mixed; noise (B, noise_size) float32 in [0, 1).

        Raises:
            DataError: more images than allowed cannot be read; the message names them.
        """
        return in_parallel(self._sample, islice(self._positions(start_step), steps), self._collate, self.workers)

    def as_dataset(self, start_step: int, steps: int) -> GeneratorDataset:
        """The same batches as a MindSpore dataset, for sinking to a device; columns: the transform's, and noise."""
        from mindspore.dataset import GeneratorDataset, config  # only now: other uses of this package need no MindSpore

        config.set_prefetch_size(2)  # of whole batches: MindSpore's 16 would take gigabytes
        names = [*self.transform.columns, "noise"]
        return GeneratorDataset(_Stream(self, start_step, steps), names, shuffle=False)


class _Stream:
    """Batches with a length: without one MindSpore would run through all of them to count."""

    def __init__(self, loader: TrainLoader, start_step: int, steps: int) -> None:
        self.loader, self.start_step, self.steps = loader, start_step, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        return self.loader.batches(self.start_step, self.steps)


class EvalLoader:
    """This rank's share of a validation set, every image exactly once over all ranks.

    All ranks have the same number of batches and all batches the same size: what is missing is filled with zeros
    labelled -1. An unreadable image is an error, unless `skip_damaged`: then it is reported and left out.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: EvalTransform,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: Optional[int] = None,
        skip_damaged: bool = False,
    ) -> None:
        self.dataset, self.transform, self.batch_size = dataset, transform, batch_size
        self.rank, self.world_size, self.skip_damaged = rank, world_size, skip_damaged
        self.workers = num_workers or default_workers()
        self.damaged = Damaged("left out", len(dataset), len(dataset))

    def __len__(self) -> int:
        largest_share = -(-len(self.dataset) // self.world_size)
        return -(-largest_share // self.batch_size)

    def indices(self, batch: int) -> np.ndarray:
        """The images of a batch of this rank; those beyond the data set's end are padding."""
        return self.rank + self.world_size * np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)

    def _sample(self, index: int) -> tuple[np.ndarray, np.int32]:
        if index < len(self.dataset):
            try:
                return self.transform(self.dataset.load(index)), self.dataset.labels[index]
            except DataError as error:
                if not self.skip_damaged:
                    raise
                self.damaged.note(self.dataset.describe(index), error)
        pixels = self.transform.preprocessing
        return np.zeros((pixels.in_channels, *pixels.image_size), np.float32), np.int32(-1)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields images (B, C, H, W) float32 and labels (B,) int32, -1 for padding."""
        batches = (self.indices(batch).tolist() for batch in range(len(self)))

        def collate(_: Sequence[int], samples: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
            images, labels = (np.stack(column) for column in zip(*samples))
            return images, labels

        return in_parallel(self._sample, batches, collate, self.workers)
