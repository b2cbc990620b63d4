"""SKNet's attention: how much each unit chooses its larger kernel, for each class and at several sizes of the object.

The figure of the paper (section 4.4): the mean over the channels of the weights of the last path minus those of the
first, in SKNet-50 5x5 minus 3x3, averaged over the validation images of each class. The object grows by cropping the
middle of the image and enlarging it: at scale 1.5 the network sees the middle 1/1.5 of each side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from tqdm import tqdm

from ..compile_cache import compile_cached
from ..data import EvalTransform, Preprocessing
from ..data.lists import write_table
from ..errors import ConfigError
from ..models.sknet import SelectiveKernel, SKNet
from ..modes import graph_mode, pynative_mode
from ..streams import unfailing_stderr
from .drawing import grid, name_classes, new_figure, save_figure, short_name, show_picture, shown, write_json
from .opening import Images, Subject, batches, displayed, open_labelled, some_images


class AttentionProbe(nn.Cell):
    """The mean over the channels of every unit's softmax weights: (B, C, H, W) -> (B, units, paths).

    One forward pass, without the classifier.
    """

    def __init__(self, network: SKNet) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, x: Tensor) -> Tensor:
        network = self.network
        means = []
        x = network.pool(network.stem(x))
        for stage in network.stages:
            for unit in stage:
                outputs = unit.sk.split(unit.reduce(x))
                weights = unit.sk.attention(unit.sk.fuse(outputs))  # (B, paths, C)
                means.append(weights.astype(ms.float32).mean(-1))
                x = ops.relu(unit.increase(unit.sk.select(outputs, weights)) + unit.proj(x))
        return ops.stack(means, 1)


def unit_names(network: SKNet) -> list[str]:
    """The units, as the paper counts them: "SK_2_1" is the first of the first stage."""
    return [f"SK_{i}_{j}" for i, stage in enumerate(network.stages, start=2) for j in range(1, len(stage) + 1)]


def path_names(network: SKNet) -> list[str]:
    """The kernels of a unit's paths by the pixels that they span: a 3x3 one dilated by 2 is "5x5", as in the paper."""
    kernel: SelectiveKernel = network.stages[0][0].sk
    spans = [path.conv.dilation[0] * (path.conv.kernel_size[0] - 1) + 1 for path in kernel.paths]
    return [f"{span}x{span}" for span in spans]


def at_scale(pixels: Preprocessing, scale: float) -> Preprocessing:
    """The preprocessing that shows the middle of an image, enlarged by `scale`.

    Raises:
        ConfigError: the scale shows more than the image.
    """
    crop_pct = pixels.crop_pct / scale
    if not 0 < crop_pct <= 1:
        raise ConfigError(
            f"scales has {scale:g}, but the network is shown {pixels.crop_pct:g} of each side at scale 1: expected at "
            f"least {pixels.crop_pct:g}"
        )
    return dataclasses.replace(pixels, crop_pct=crop_pct)


def probe(
    subject: Subject, images: Images, scales: Sequence[float], progress: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Mean weights of the images: places in `images` (n,), and (scales, n, units, paths) float64.

    In graph mode, one forward pass an image and scale; every image is read once.
    """
    transforms = [EvalTransform(at_scale(subject.pixels, scale)) for scale in scales]
    cell = AttentionProbe(subject.network).set_train(False)
    size, compiled = min(subject.config.batch_size, len(images)), False
    options = (subject.config.model, subject.network.options, "attention")
    bar = tqdm(total=len(images), unit="image", disable=None if progress else True, file=unfailing_stderr())
    with graph_mode():
        for places, pixels in batches(images, transforms, size, subject.config, pad=True):
            found = []
            for each in pixels:
                tensor = Tensor(np.ascontiguousarray(each))
                if not compiled:
                    compile_cached(cell, tensor, options=options, what="the attention")
                    compiled = True
                found.append(cell(tensor).asnumpy()[: len(places)].astype(np.float64))
            bar.update(len(places))
            yield places, np.stack(found)
    bar.close()


@dataclasses.dataclass(frozen=True)
class ClassAttention:
    """Mean weights by class.

    Attributes:
        mean: (scales, units, classes, paths); nan of a class without images. images: (classes,) how many there were.
    """

    scales: Sequence[float]
    units: Sequence[str]
    paths: Sequence[str]
    class_names: Sequence[str]
    mean: np.ndarray
    images: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """(scales, units, classes): the last path's mean weight minus the first's."""
        return self.mean[..., -1] - self.mean[..., 0]

    def over_all(self) -> np.ndarray:
        """(scales, units): the mean difference over all images."""
        known = self.images > 0
        return (self.difference[..., known] * self.images[known]).sum(-1) / self.images.sum()


def check_network(subject: Subject) -> SKNet:
    """The network, where it has the attention of SKNet.

    Raises:
        ConfigError: it has not.
    """
    network = subject.network
    if not isinstance(network, SKNet):
        raise ConfigError(
            f"{subject.config.ckpt_path} holds {subject.config.model}, which has no attention over kernels; expected "
            f"an SKNet or SK-ResNet (sknet26, sknet50, sk_resnet18, ...)"
        )
    return network


def by_class(subject: Subject, scales: Sequence[float]) -> ClassAttention:
    """The attention of each class over the whole validation set, in one pass over the images.

    Raises:
        UserError: the network has none, or the data is missing or of other classes.
    """
    network = check_network(subject)
    dataset = open_labelled(subject)
    units, paths, names = unit_names(network), path_names(network), list(dataset.class_names)
    labels = np.asarray(dataset.labels)
    everything = Images(range(len(dataset)), dataset.load, labels)  # type: ignore[arg-type]
    sums = np.zeros((len(names), len(scales), len(units), len(paths)))
    counts = np.zeros(len(names), np.int64)
    for places, weights in probe(subject, everything, scales):
        np.add.at(sums, labels[places], weights.transpose(1, 0, 2, 3))
        np.add.at(counts, labels[places], 1)
    with np.errstate(invalid="ignore"):
        mean = (sums / counts[:, None, None, None]).transpose(1, 2, 0, 3)
    return ClassAttention(list(scales), units, paths, names, mean, counts)


def last_of_stages(network: SKNet) -> list[int]:
    """The number of the last unit of each stage: those that the paper shows."""
    return (np.cumsum([len(stage) for stage in network.stages]) - 1).tolist()


def draw_by_class(path: Path, found: ClassAttention, units: Sequence[int]) -> None:
    """Draws the mean difference of each class for some units, a line a scale; classes are sorted at the first scale."""
    figure = new_figure(3.6 * min(2, len(units)) + 1, 2.6 * -(-len(units) // 2) + 0.6)
    axes = figure.subplots(-(-len(units) // 2), min(2, len(units)), squeeze=False).ravel()
    known = np.flatnonzero(found.images)
    for place, unit in zip(axes, units):
        order = known[np.argsort(found.difference[0, unit, known], kind="stable")]
        for number, scale in enumerate(found.scales):
            style = "o-" if len(order) <= 40 else "-"
            place.plot(found.difference[number, unit, order], style, markersize=3, linewidth=1, label=f"{scale:g}x")
        place.axhline(0, color="grey", linewidth=0.5)
        place.set(title=found.units[unit], ylabel=f"{found.paths[-1]} minus {found.paths[0]}")
        name_classes(place.xaxis, [found.class_names[i] for i in order], rotation=0 if len(order) <= 10 else 90)
        place.set_xlabel("class, sorted at the first scale")
    for place in axes[len(units) :]:
        place.set_axis_off()
    lines, said = axes[0].get_legend_handles_labels()
    figure.legend(lines, said, title="size of the object", fontsize=8, ncols=len(said), loc="outside lower center")
    figure.suptitle("Mean attention, by class")
    save_figure(figure, path)


def draw_by_unit(path: Path, found: ClassAttention) -> None:
    """Draws the mean difference of each unit over all images, a line a scale."""
    figure = new_figure(max(5, 0.35 * len(found.units) + 2), 3.2)
    axes = figure.subplots()
    for number, scale in enumerate(found.scales):
        axes.plot(found.over_all()[number], "o-", markersize=4, label=f"{scale:g}x")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set_xticks(range(len(found.units)), found.units, rotation=90 if len(found.units) > 9 else 45, fontsize=8)
    axes.set(ylabel=f"{found.paths[-1]} minus {found.paths[0]}", title="Mean attention over all images, by unit")
    axes.legend(title="size of the object", fontsize=8)
    save_figure(figure, path)


def draw_images(path: Path, subject: Subject, images: Images, scales: Sequence[float]) -> list[list[Any]]:
    """Draws single images at each scale, and beside them the attention of every unit.

    Returns:
        Rows of image, scale, unit, path, mean weight, and mean difference.
    """
    network = check_network(subject)
    units, paths = unit_names(network), path_names(network)
    transforms = [EvalTransform(at_scale(subject.pixels, scale)) for scale in scales]
    figure, axes = grid(len(images), len(scales) + 1, 2.0)
    rows: list[list[Any]] = []
    cell = AttentionProbe(network).set_train(False)
    drawn = np.zeros(len(images), bool)
    with pynative_mode():
        for places, pixels in batches(images, transforms, subject.config.batch_size, subject.config):
            weights = np.stack([cell(Tensor(np.ascontiguousarray(each))).asnumpy() for each in pixels])
            for i, place in enumerate(places):
                drawn[place] = True
                for number, scale in enumerate(scales):
                    show_picture(axes[place, number], displayed(pixels[number, i], subject.pixels))
                    axes[place, number].set_title(f"{scale:g}x", fontsize=8)
                    for unit, each in zip(units, weights[number, i]):
                        difference = float(each[-1] - each[0])
                        rows += [[images.names[place], scale, unit, *pair, difference] for pair in zip(paths, each)]
                curve = axes[place, -1]
                for number, scale in enumerate(scales):
                    values = weights[number, i, :, -1] - weights[number, i, :, 0]
                    curve.plot(values, "o-", markersize=2.5, linewidth=1, label=f"{scale:g}x")
                curve.axhline(0, color="grey", linewidth=0.5)
                curve.set_xticks(range(len(units)), units, rotation=90, fontsize=6)
                curve.yaxis.set_major_locator(_locator())
                curve.tick_params(axis="y", labelsize=6)
                axes[place, 0].set_ylabel(shown(short_name(images.names[place]), 20), fontsize=7)
    for place in np.flatnonzero(~drawn):
        for each in axes[place]:
            each.set_axis_off()
    axes[0, -1].legend(fontsize=6)
    axes[0, -1].set_title(f"{paths[-1]} minus {paths[0]}", fontsize=8)
    save_figure(figure, path)
    return rows


def _locator() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def write(out: Path, subject: Subject, scales: Sequence[float], files: Sequence[Path], number: int, ending: str) -> Any:
    """Everything that `mindska analyze attention` writes; yields what it says."""
    network = check_network(subject)
    for scale in scales:
        at_scale(subject.pixels, scale)
    if subject.config.data_dir:
        found = by_class(subject, scales)
        header = ("scale", "unit", "class", "images", *(f"mean_{name}" for name in found.paths), "difference")
        rows = (
            [
                scale,
                unit,
                name,
                int(found.images[c]),
                *_cells(found.mean[s, u, c]),
                *_cells([found.difference[s, u, c]]),
            ]
            for s, scale in enumerate(found.scales)
            for u, unit in enumerate(found.units)
            for c, name in enumerate(found.class_names)
        )
        write_table(out / "attention.csv", header, rows)
        overall = {f"{scale:g}": dict(zip(found.units, row)) for scale, row in zip(scales, found.over_all().tolist())}
        facts: dict[str, Any] = dict(model=subject.config.model, ckpt_path=subject.config.ckpt_path, paths=found.paths)
        write_json(out / "attention.json", dict(facts, images=int(found.images.sum()), mean_difference=overall))
        draw_by_class(out / f"attention.{ending}", found, last_of_stages(network))
        draw_by_unit(out / f"attention_by_unit.{ending}", found)
        yield f"{int(found.images.sum()):,} images at {_counted(scales)}: {found.paths[-1]} minus {found.paths[0]}"
        yield "unit      " + "".join(f"{f'{scale:g}x':>9}" for scale in scales)
        for unit, values in zip(found.units, found.over_all().T):
            yield f"{unit:<10}" + "".join(f"{value:9.4f}" for value in values)
        yield f"{out / 'attention.csv'}, {out / f'attention.{ending}'}, {out / f'attention_by_unit.{ending}'}"
        if empty := [name for name, count in zip(found.class_names, found.images) if not count]:
            yield f"{len(empty)} classes have no image and are left out: {', '.join(map(shown, empty[:5]))}"
    images = some_images(subject, files, number)
    rows_of_images = draw_images(out / f"attention_images.{ending}", subject, images, scales)
    header = ("image", "scale", "unit", "path", "mean_weight", "difference")
    write_table(out / "attention_images.csv", header, rows_of_images)
    yield f"{len(images)} single images: {out / f'attention_images.{ending}'}, {out / 'attention_images.csv'}"


def _counted(scales: Sequence[float]) -> str:
    return f"{len(scales)} scale" + ("s" if len(scales) > 1 else "")


def _cells(values: Any) -> list[Any]:
    return [round(float(value), 7) if np.isfinite(value) else "" for value in values]
