"""Networks on a validation set: figures over every image exactly once, of all, of each class and of each image.

Every rank computes the logits of its share of the images; what they say of each image is gathered, and all figures are
made from that in the order of the images. So they do not depend on the number of ranks.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from . import builders
from .compile_cache import compile_cached
from .config import Config
from .data import EvalLoader, EvalTransform, ImageDataset, Preprocessing
from .data.datasets import chosen_classes
from .data.imagenet import imagenet_classes
from .data.lists import write_table
from .distributed import World, all_gather_object
from .errors import ConfigError, DataError, PredictionError, RunError, UserError, WriteError, few, printable
from .evaluation import NOTHING_TO_EVALUATE, Result
from .prediction import Logits, is_exported, open_exported
from .streams import print_result, unfailing_stderr
from .weights import Weights

log = logging.getLogger("mindska")

TOP = 5  # classes that are kept of each image
SHOWN = 5  # of the classes with the lowest accuracy
FLIP = "flip"
# Of a file of ImageNet's validation images, such as ILSVRC2012_val_00000001.JPEG, from 1 on.
IMAGENET_NUMBER = re.compile(r"_val_(\d{8})\.")


@dataclass(frozen=True)
class Outcomes:
    """What a network says of images, in the order of the data set.

    Attributes:
        indices: (N,) of the images; labels: (N,).
        classes: (N, k) the most probable ones, the most probable first; probabilities: (N, k).
        before: (N,) how many classes come before the true one; a tie is not won for free, a NaN never.
        losses: (N,) cross entropy, natural logarithm, float64.
        unreadable: what to call an image that was left out -> why.
    """

    indices: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    before: np.ndarray
    losses: np.ndarray
    unreadable: dict[str, str]

    def result(self) -> Result:
        """Top-1, top-5 and loss over all images."""
        top1, top5 = (100 * float((self.before < k).mean()) for k in (1, 5))
        return Result(top1, top5, float(self.losses.mean()), len(self.indices))


def outcomes_of(logits: np.ndarray, labels: np.ndarray, allowed: Optional[np.ndarray] = None) -> dict[str, np.ndarray]:
    """The figures of `Outcomes` for logits (N, classes) and labels (N,).

    Args:
        allowed: (classes,) bool, those that are chosen among; default: all.
    """
    values = logits.astype(np.float64)
    if allowed is not None:
        values[:, ~allowed] = -np.inf
    own = np.take_along_axis(values, labels[:, None].astype(np.int64), 1)
    with np.errstate(invalid="ignore", over="ignore"):
        tied = (values == own) & (np.arange(values.shape[1]) < labels[:, None])
        before = (tied | ~(values <= own)).sum(1)
        powers = np.exp(values - values.max(1, keepdims=True))
        probabilities = powers / powers.sum(1, keepdims=True)
        losses = np.log(powers.sum(1)) - (own[:, 0] - values.max(1))
    most = min(TOP, values.shape[1] if allowed is None else int(allowed.sum()))
    classes = np.argsort(-values, axis=1, kind="stable")[:, :most]
    return dict(
        labels=labels,
        classes=classes.astype(np.int32),
        probabilities=np.take_along_axis(probabilities, classes, 1).astype(np.float32),
        before=before.astype(np.int32),
        losses=losses,
    )


def predict_all(
    logits: Logits,
    loader: EvalLoader,
    num_classes: int,
    allowed: Optional[np.ndarray] = None,
    tta: Optional[str] = None,
    progress: bool = False,
) -> Outcomes:
    """What a network says of the images of all ranks' loaders, each exactly once; every rank must call it.

    Args:
        allowed: see `outcomes_of`.
        tta: "flip": the mean of the logits of an image and its mirror image.
        progress: show a bar.

    Raises:
        DataError: there is no image, or one is unreadable and may not be left out.
        PredictionError: the network gives outputs of another shape.
    """
    error: Optional[UserError] = None
    parts: list[dict[str, np.ndarray]] = []
    shown = tqdm(loader, unit="batch", disable=None if progress else True, file=unfailing_stderr())
    try:
        for batch, (images, labels) in enumerate(shown):
            found = logits(images)
            if tta == FLIP:
                found = (found.astype(np.float64) + logits(np.ascontiguousarray(images[..., ::-1]))) / 2
            if found.shape != (len(images), num_classes):
                raise PredictionError(
                    f"The network gives outputs of the shape {found.shape}; expected {len(images)} images by "
                    f"{num_classes} classes"
                )
            real = labels >= 0
            parts.append(dict(indices=loader.indices(batch)[real], **outcomes_of(found[real], labels[real], allowed)))
    except UserError as raised:
        error = raised
    ours = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts and not error else {}
    every = all_gather_object((ours, loader.damaged.reasons, error and str(error)))
    if failure := next((said for *_, said in every if said), None):
        raise error or DataError(failure)  # the same on all ranks: none waits for another
    joined = {name: np.concatenate([arrays[name] for arrays, *_ in every]) for name in ours}
    if not len(joined["indices"]):
        raise DataError(NOTHING_TO_EVALUATE)
    order = np.argsort(joined["indices"], kind="stable")
    unreadable = {name: reason for _, reasons, _ in every for name, reason in reasons.items()}
    return Outcomes(**{name: array[order] for name, array in joined.items()}, unreadable=unreadable)


def per_class(outcomes: Outcomes, class_names: Sequence[str], chosen: Optional[np.ndarray] = None) -> list[dict]:
    """Of each class: support (images), accuracy and recall (the share of them that is found; here the same), precision
    (the share of what is called so that is so), in percent; None where there is nothing to share.

    Args:
        chosen: (classes,) bool, those of which figures are wanted; default: all.
    """
    first = outcomes.classes[:, 0]
    # By the rank of the true class, as top-1 is: outputs that are NaN are right for no class.
    hits = np.bincount(outcomes.labels[outcomes.before == 0], minlength=len(class_names))
    support, called = (np.bincount(each, minlength=len(class_names)) for each in (outcomes.labels, first))
    rows = []
    for number, name in enumerate(class_names):
        if chosen is None or chosen[number]:
            recall = 100 * int(hits[number]) / int(support[number]) if support[number] else None
            precision = 100 * int(hits[number]) / int(called[number]) if called[number] else None
            rows.append(
                dict(index=number, name=name, support=int(support[number]), accuracy=recall, precision=precision,
                     recall=recall)
            )  # fmt: skip
    return rows


def mean_class_accuracy(rows: Sequence[dict]) -> float:
    """The mean of the accuracies of the classes that have images, in percent."""
    return float(np.mean([row["accuracy"] for row in rows if row["accuracy"] is not None]))


def read_real_labels(path: Path, dataset: ImageDataset) -> list[set[int]]:
    """The reassessed labels of each image of a data set (ReaL, Beyer et al., 2020), as numbers of its classes.

    The file is a list of lists in the order of the names of ImageNet's validation files. An image is found by the
    number in its name (ILSVRC2012_val_00000001.JPEG); without such numbers, there must be as many images as lists, and
    the names are sorted.

    Raises:
        DataError: it is no such file, or does not fit the images.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read: {str(error)[:200]}; expected ReaL's list of lists of labels"
        ) from error
    whole = isinstance(table, list) and all(
        isinstance(each, list) and all(type(label) is int and label >= 0 for label in each) for each in table
    )
    if not whole:
        raise DataError(f"{path} is no list of lists of labels; expected those of ReaL, one list for each image")
    names = [dataset.member(i)[0].rpartition("/")[2] for i in range(len(dataset))]
    numbers = [int(found[1]) - 1 if (found := IMAGENET_NUMBER.search(name)) else -1 for name in names]
    if min(numbers) < 0:
        if len(names) != len(table) or len(set(names)) != len(names):
            raise DataError(
                f"{path} has labels of {len(table):,} images, the validation set has {len(names):,}, of "
                f"{len(set(names)):,} names; expected as many, each with a name of its own"
            )
        place = {name: i for i, name in enumerate(sorted(names))}
        numbers = [place[name] for name in names]
    if max(numbers) >= len(table):
        raise DataError(f"{path} has labels of {len(table):,} images; there is one of number {max(numbers) + 1:,}")
    most = max((label for each in table for label in each), default=-1)
    if most >= len(dataset.class_names):
        raise DataError(f"{path} has label {most}, but there are {len(dataset.class_names):,} classes")
    # The labels number ImageNet's classes; a network may have them in another order.
    synsets = list(imagenet_classes())
    own = {name: i for i, name in enumerate(dataset.class_names)}
    translated = [own[name] for name in synsets] if set(own) == set(synsets) else list(range(len(own)))
    return [{translated[label] for label in table[number]} for number in numbers]


def real_accuracy(outcomes: Outcomes, labels: Sequence[set[int]]) -> dict[str, float]:
    """Top-1 and top-5 in percent by labels of `read_real_labels`, over the images that have any, and their number."""
    rated = [(labels[index], row) for index, row in zip(outcomes.indices, outcomes.classes) if labels[index]]
    if not rated:
        return dict(real_top1=0.0, real_top5=0.0, real_images=0)
    top1 = sum(int(row[0]) in known for known, row in rated)
    top5 = sum(not known.isdisjoint(row.tolist()) for known, row in rated)
    return dict(real_top1=100 * top1 / len(rated), real_top5=100 * top5 / len(rated), real_images=len(rated))


def write_details(path: Path, outcomes: Outcomes, dataset: ImageDataset) -> None:
    """Writes a row for every image of the data set as CSV: path, label, prediction, the most probable classes, error.

    Raises:
        WriteError: it cannot be written.
    """
    names, most = dataset.class_names, outcomes.classes.shape[1]
    header = ["path", "label", "prediction"]
    header += [f"{what}_{k}" for k in range(1, most + 1) for what in ("class", "probability")]
    place = {int(index): row for row, index in enumerate(outcomes.indices)}

    def row(index: int) -> list[object]:
        path, label = dataset.describe(index), names[dataset.labels[index]]
        if index not in place:
            return [path, label, *[""] * (1 + 2 * most), outcomes.unreadable.get(path, "")]
        at = place[index]
        cells: list[object] = []
        for number, probability in zip(outcomes.classes[at], outcomes.probabilities[at]):
            cells += [names[number] if number < len(names) else f"class {number}", f"{probability:.6f}"]
        return [path, label, cells[0], *cells, ""]

    write_table(path, [*header, "error"], (row(index) for index in range(len(dataset))))


class Shared:
    """What checkpoints share that are evaluated one after the other: the images, and of equal networks the graph."""

    def __init__(self) -> None:
        self.datasets: dict[str, ImageDataset] = {}
        self.key: Optional[str] = None
        self.network: Optional[nn.Cell] = None
        self.compiled: set[tuple[int, ...]] = set()

    def dataset(self, config: Config, record: dict[str, Any]) -> ImageDataset:
        """The validation images for a network with this record."""
        key = json.dumps([record.get("class_names"), record.get("train_set")])
        if key not in self.datasets:
            self.datasets = {key: builders.open_validation_data(config, record)}
        return self.datasets[key]

    def logits(self, config: Config, num_classes: int, pixels: Preprocessing, weights: Weights) -> Logits:
        """The network with these weights, as a function. It holds until the next is asked for.

        Raises:
            UserError: the weights do not fit, or the images are too small.
        """
        made_like = (config.model, num_classes, pixels.in_channels, weights.record.get("network", {}), config.amp_level)
        key = json.dumps(made_like, sort_keys=True)
        # In half precision the network's parameters are no longer those that weights are put into.
        if key != self.key or self.network is None or config.amp_level != "O0":
            self.network, self.key, self.compiled = None, None, set()
            self.network = builders.build_network(config, num_classes, pixels.in_channels, weights).set_train(False)
            self.key = key
        else:
            weights.for_channels(pixels.in_channels).load_into(self.network)
        network = self.network
        builders.check_image_size(network, pixels)

        def logits(images: np.ndarray) -> np.ndarray:
            tensor = Tensor(images)
            if images.shape not in self.compiled:
                compile_cached(network, tensor, options=key)
                self.compiled.add(images.shape)
            return network(tensor).astype(ms.float32).asnumpy()

        return logits


@dataclass(frozen=True)
class Prepared:
    """All that the evaluation of one checkpoint takes.

    Attributes:
        chosen: (classes,) bool, those that are evaluated; None: all.
        real: see `read_real_labels`.
    """

    config: Config
    logits: Logits
    loader: EvalLoader
    num_classes: int
    chosen: Optional[np.ndarray]
    real: Optional[list[set[int]]]


def validate_each(
    config: Config, world: World, prepare: Callable[[Config], Any], evaluate: Callable[[Any], dict[str, Any]]
) -> None:
    """Prepares and evaluates every checkpoint that the configuration names; every rank must call it.

    Args:
        prepare: opens a checkpoint and its data. evaluate: what it gave -> a row of results.

    Raises:
        UserError: a checkpoint or the data cannot be used. Of several checkpoints the others are evaluated first.
    """
    paths = [config.ckpt_path, *config.more_ckpt_paths]
    rows: list[dict[str, Any]] = []
    failed = []
    for path in paths:
        error: Optional[UserError] = None
        prepared: Any = None
        try:
            prepared = prepare(dataclasses.replace(config, ckpt_path=path, more_ckpt_paths=()))
        except UserError as raised:
            if len(paths) == 1 or isinstance(raised, DataError):  # without images there is nothing to go on with
                raise
            error = raised
        said = next((each for each in all_gather_object(error and str(error)) if each), None)
        if said is None:
            rows.append(evaluate(prepared))
        else:
            rows.append(dict(ckpt_path=path, error=said))
            failed.append(path)
            log.error("error: %s: %s", printable(path), said)
        if config.result_csv and world.rank == 0:  # at once: what is done is there if the rest fails
            header = list(dict.fromkeys(name for row in rows for name in row if name != "error")) + ["error"]
            write_table(Path(config.result_csv), header, ([row.get(name, "") for name in header] for row in rows))
    if failed:
        raise RunError(f"{len(failed)} of {len(paths)} checkpoints could not be evaluated: {few(failed)}")


def validate(config: Config, world: World) -> None:
    """Evaluates the checkpoints that the configuration names; prints and writes the results. Every rank must call it.

    Raises:
        UserError: a checkpoint or the data cannot be used. Of several checkpoints the others are evaluated first.
    """
    shared, several = Shared(), bool(config.more_ckpt_paths)
    validate_each(
        config, world, lambda one: prepare(one, world, shared), lambda prepared: _evaluate(prepared, world, several)
    )


def prepare(config: Config, world: World, shared: Shared) -> Prepared:
    """Opens a checkpoint, and the images for it.

    Raises:
        UserError: a checkpoint or the data cannot be used.
    """
    exported: Optional[Logits] = None
    weights: Optional[Weights] = None
    if is_exported(config.ckpt_path):
        exported, record, own_pixels, fixed_batch = open_exported(Path(config.ckpt_path), config.use_ema)
        batch_size = fixed_batch or config.batch_size
        if config.model not in ("", record["model"]):
            raise ConfigError(f"{config.ckpt_path} holds {record['model']}, but the model asked for is {config.model}")
    else:
        weights = builders.configured_weights(config)
        assert weights is not None  # the command asks for a checkpoint
        record, batch_size = weights.record, config.batch_size
    config = builders.with_recorded_model(config, record)
    dataset = shared.dataset(config, record)
    builders.check_labels(dataset, training=False)
    num_classes = builders.evaluated_classes(config, record, dataset.class_names)
    pixels = builders.build_preprocessing(config, record.get("preprocessing"))
    if exported is not None:
        size = own_pixels.image_size
        if config.image_resize is None:
            pixels = dataclasses.replace(pixels, image_size=size)
        elif pixels.image_size != size:
            raise ConfigError(
                f"image_resize is {pixels.image_size}; {config.ckpt_path} was exported for {size[0]}x{size[1]} pixels"
            )
    loader = EvalLoader(
        dataset,
        EvalTransform(pixels),
        batch_size,
        skip_damaged=config.val_skip_damaged,
        **builders.loader_share(config, world),
    )
    chosen = None
    if config.classes:
        wanted = set(chosen_classes(config.classes))
        chosen = np.zeros(num_classes, bool)
        chosen[: len(dataset.class_names)] = [name in wanted for name in dataset.class_names]
    real = read_real_labels(Path(config.real_labels), dataset) if config.real_labels else None
    logits = exported or shared.logits(config, num_classes, pixels, weights)  # type: ignore[arg-type]
    return Prepared(config, logits, loader, num_classes, chosen, real)


def _evaluate(prepared: Prepared, world: World, several: bool) -> dict[str, Any]:
    """Evaluates one checkpoint, writes and prints its results, and returns its row of them."""
    config, allowed = prepared.config, prepared.chosen if prepared.config.mask_classes else None
    outcomes = predict_all(
        prepared.logits, prepared.loader, prepared.num_classes, allowed, config.tta, progress=world.rank == 0
    )
    result = outcomes.result()
    more = real_accuracy(outcomes, prepared.real) if prepared.real else {}
    if world.rank == 0:
        _report(prepared, world, outcomes, result, more, several)
    return dict(ckpt_path=config.ckpt_path, model=config.model, **dataclasses.asdict(result), **more)


def _report(
    prepared: Prepared, world: World, outcomes: Outcomes, result: Result, more: dict[str, float], several: bool
) -> None:
    """Writes and prints the results of one checkpoint, which may be one of several."""
    config, chosen, num_classes = prepared.config, prepared.chosen, prepared.num_classes
    dataset, pixels = prepared.loader.dataset, prepared.loader.transform.preprocessing
    names = [*dataset.class_names, *(f"class {i}" for i in range(len(dataset.class_names), num_classes))]
    classes = per_class(outcomes, names, chosen)
    facts: dict[str, Any] = dict(model=config.model, ckpt_path=config.ckpt_path, world_size=world.size)
    facts.update(preprocessing=dataclasses.asdict(pixels), validation_set=dataset.identity(), **more)
    facts.update(mean_class_accuracy=mean_class_accuracy(classes), tta=config.tta, unreadable=len(outcomes.unreadable))
    said = ""
    if chosen is not None:
        facts.update(classes_evaluated=int(chosen.sum()), other_classes_masked=config.mask_classes)
        how = "the others masked" if config.mask_classes else "the others not masked"
        said += f", of {int(chosen.sum())} of {num_classes} classes ({how})"
    said += ", mean with mirror images" if config.tta == FLIP else ""
    if more:
        said += "; ReaL: top-1 {real_top1:.2f} %, top-5 {real_top5:.2f} % over {real_images} images".format(**more)
    if config.class_csv:
        header = ("index", "name", "support", "accuracy", "precision", "recall")
        write_table(Path(config.class_csv), header, ([row[name] for name in header] for row in classes))
    if config.details:
        write_details(Path(config.details), outcomes, dataset)
    if config.result_json:
        result.write(Path(config.result_json), **facts, classes=classes)
    known = sorted((row for row in classes if row["support"]), key=lambda row: row["accuracy"])
    if len(known) > 1 and not several:
        worst = few(f"{row['name']} {row['accuracy']:.2f} % of {row['support']}" for row in known[:SHOWN])
        log.info("mean of the classes' accuracies %.2f %%; the lowest: %s", facts["mean_class_accuracy"], worst)
    line = f"{config.ckpt_path}: {result}{said}"
    refused = print_result(line)
    if refused and not (config.result_json or config.result_csv):
        raise WriteError(f"standard output cannot be written ({refused}); the result is\n{line}")
