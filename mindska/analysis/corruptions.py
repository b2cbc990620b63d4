"""Robustness to corrupted images: ImageNet-C (Hendrycks and Dietterich, ICLR 2019).

The images come from a folder in ImageNet-C's layout, CORRUPTION/SEVERITY/CLASS/IMAGE (also within its groups: noise,
blur, weather, digital, extra), or are made of the validation images by the package `imagecorruptions-imaug`: each is
resized and cropped as for the network, then corrupted. The published images were saved as JPEG files afterwards, which
is left out here: figures on images that are made compare with each other, and only roughly with published ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image

from .. import builders
from ..config import Config
from ..data import EvalLoader, EvalTransform, ImageDataset, Preprocessing
from ..data.folders import is_folder, subfolders
from ..data.images import DecodeSize
from ..data.lists import write_table
from ..distributed import World
from ..errors import ConfigError, DataError, SettingError, few
from ..evaluation import Result
from ..names import CORRUPTIONS, chosen_corruptions
from ..streams import print_result
from ..tasks import task_of_file
from ..validation import Prepared, Shared, predict_all, prepare
from .drawing import DPI, network_names, new_figure, save_figure, shown, write_json

log = logging.getLogger("mindska")

# Top-1 errors of AlexNet, mean of the five severities, in percent: the paper's 15, and the 4 that its authors add.
ALEXNET = dict(
    gaussian_noise=88.6, shot_noise=89.4, impulse_noise=92.3, defocus_blur=82.0, glass_blur=82.6, motion_blur=78.6,
    zoom_blur=79.8, snow=86.7, frost=82.7, fog=81.9, brightness=56.5, contrast=85.3, elastic_transform=64.6,
    pixelate=71.8, jpeg_compression=60.7, speckle_noise=84.5, gaussian_blur=78.7, spatter=71.8, saturate=65.8,
)  # fmt: skip
ALEXNET_CLEAN = 43.5  # on the images as they were
COMMON = CORRUPTIONS[:15]
SEVERITIES = (1, 2, 3, 4, 5)
GROUPS = ("noise", "blur", "weather", "digital", "extra")  # folders of the published archives
SMALLEST = 32  # pixels on a side that the package takes
SEEDED = ("impulse_noise", "glass_blur")  # which draw their own random numbers, from a seed that they are given
_drawing = threading.Lock()  # the others draw from NumPy's global generator


def seed_of(corruption: str, severity: int, name: str) -> int:
    """What the random numbers of a corruption start from, for an image of this name."""
    return int.from_bytes(
        hashlib.sha256(f"{corruption}\0{severity}\0{name}".encode("utf-8", "replace")).digest()[:4], "big"
    )


def corrupted(image: np.ndarray, corruption: str, severity: int, seed: int) -> np.ndarray:
    """An image (H, W, 3) uint8, corrupted by `imagecorruptions`; the same seed gives the same pixels.

    Raises:
        ConfigError: the image is too small. SettingError: the package is missing.
    """
    if min(image.shape[:2]) < SMALLEST:
        raise ConfigError(
            f"image_resize is {image.shape[0]} {image.shape[1]}; corruptions are made of images of at least "
            f"{SMALLEST}x{SMALLEST} pixels"
        )
    check_package()
    from imagecorruptions import corrupt

    options = dict(seed=seed) if corruption in SEEDED else {}
    with _drawing:
        before = np.random.get_state()  # noqa: NPY002 - the package draws from it
        np.random.seed(seed)  # noqa: NPY002
        try:
            return corrupt(image, corruption_name=corruption, severity=severity, **options)
        finally:
            np.random.set_state(before)  # noqa: NPY002


def check_package() -> None:
    """SettingError where the package that makes corruptions is missing."""
    if find_spec("imagecorruptions") is None:
        raise SettingError(
            "Corrupted images are made by a package that is missing: pip install imagecorruptions-imaug "
            "(or pip install 'mindska[corruptions]'); or name a folder in ImageNet-C's layout with --corruptions_dir"
        )


class CorruptedDataset(ImageDataset):
    """Images of a data set as a network is shown them, corrupted; their size is the network's input.

    Args:
        images: as they were. pixels: how they are resized and cropped.
    """

    def __init__(self, images: ImageDataset, pixels: Preprocessing, corruption: str, severity: int) -> None:
        self.images, self.corruption, self.severity = images, corruption, severity
        self.root, self.split = images.root, f"{images.split}, {corruption} {severity}"
        self.class_names, self.labels = images.class_names, images.labels
        self.pixels = pixels
        self.transform = _Cropped(pixels)

    def member(self, index: int) -> tuple[str, int]:
        return self.images.member(index)

    def describe(self, index: int) -> str:
        return f"{self.images.describe(index)}, {self.corruption} {self.severity}"

    def load(self, index: int, decode_size: Optional[DecodeSize] = None) -> Image.Image:
        seed = seed_of(self.corruption, self.severity, self.images.member(index)[0])
        image = self.transform.cropped(self.images.load(index).convert("RGB"))
        return Image.fromarray(corrupted(np.asarray(image), self.corruption, self.severity, seed))


class _Cropped(EvalTransform):
    """The evaluation's resize and crop, without what makes numbers of pixels."""

    def __init__(self, pixels: Preprocessing) -> None:
        mean = pixels.mean * 3 if pixels.in_channels == 1 else pixels.mean
        std = pixels.std * 3 if pixels.in_channels == 1 else pixels.std
        super().__init__(dataclasses.replace(pixels, mean=mean, std=std))  # in colour: grey comes after the corruption

    def cropped(self, image: Image.Image) -> Image.Image:
        normalised = self(image)
        mean, std = (
            np.asarray(v, np.float32)[:, None, None] for v in (self.preprocessing.mean, self.preprocessing.std)
        )
        return Image.fromarray(np.rint((normalised * std + mean) * 255).astype(np.uint8).transpose(1, 2, 0))


def find_corruption(folder: Path, corruption: str) -> Path:
    """The folder of a corruption in one of ImageNet-C's layout.

    Raises:
        DataError: there is none.
    """
    for place in (folder / corruption, *(folder / group / corruption for group in GROUPS)):
        if is_folder(place):
            return place
    there = few(subfolders(folder)[0]) or "none"
    raise DataError(
        f"No corruption {corruption!r} in {folder}; its folders: {there}. Expected CORRUPTION/SEVERITY/CLASS/IMAGE"
    )


def check_folders(folder: Path, corruptions: Iterable[str], severities: Iterable[int]) -> None:
    """DataError where something of ImageNet-C's layout is missing: before the work, not after it."""
    if not is_folder(folder):
        raise DataError(f"No folder at {folder.absolute()}")
    for corruption in corruptions:
        place = find_corruption(folder, corruption)
        for severity in severities:
            if not is_folder(place / str(severity)):
                there = few(subfolders(place)[0]) or "none"
                raise DataError(f"No severity {severity} of {corruption} in {place}; its folders: {there}")


@dataclasses.dataclass(frozen=True)
class Robustness:
    """What a network scores on corrupted images.

    Attributes:
        clean: on the images as they were; None without them.
        results: (corruption, severity) -> its result.
    """

    ckpt_path: str
    model: str
    clean: Optional[Result]
    results: dict[tuple[str, int], Result]

    def corruptions(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.results))

    def severities(self) -> list[int]:
        return sorted({severity for _, severity in self.results})

    def error(self, corruption: str) -> float:
        """The mean top-1 error over the severities, in percent."""
        return float(np.mean([100 - self.results[corruption, severity].top1 for severity in self.severities()]))

    def mean_error(self) -> float:
        """The mean of the corruptions' errors, in percent."""
        return float(np.mean([self.error(name) for name in self.corruptions()]))

    def mce(self, names: Sequence[str], relative: bool = False) -> Optional[float]:
        """The mean over corruptions of the error divided by AlexNet's, in percent.

        Args:
            relative: of what the corruption adds to the error on clean images, of both networks.

        Returns:
            None where a corruption or one of the five severities is missing, or relative without clean images.
        """
        if tuple(self.severities()) != SEVERITIES or not set(names) <= set(self.corruptions()):
            return None
        if not relative:
            return float(np.mean([100 * self.error(name) / ALEXNET[name] for name in names]))
        if self.clean is None:
            return None
        clean = 100 - self.clean.top1
        ratios = [100 * (self.error(name) - clean) / (ALEXNET[name] - ALEXNET_CLEAN) for name in names]
        return float(np.mean(ratios))

    def figures(self) -> dict[str, Any]:
        """All figures as JSON has them, in percent."""
        return dict(
            ckpt_path=self.ckpt_path,
            model=self.model,
            clean_top1=self.clean and self.clean.top1,
            mean_corruption_error_unnormalised=self.mean_error(),
            mCE=self.mce(COMMON),
            mCE_19=self.mce(CORRUPTIONS),
            relative_mCE=self.mce(COMMON, relative=True),
            relative_mCE_19=self.mce(CORRUPTIONS, relative=True),
            severities=self.severities(),
            corruptions=[
                dict(
                    name=name,
                    error=self.error(name),
                    CE=100 * self.error(name) / ALEXNET[name] if tuple(self.severities()) == SEVERITIES else None,
                    top1={str(s): self.results[name, s].top1 for s in self.severities()},
                )
                for name in self.corruptions()
            ],
        )

    def lines(self) -> list[str]:
        """A table, and the means."""
        figures, severities = self.figures(), self.severities()
        width = max(map(len, self.corruptions())) + 2
        lines = [
            f"{self.ckpt_path}:",
            f"{'top-1, %':<{width}}" + "".join(f"{s:>8}" for s in severities) + "   error      CE",
        ]
        for row in figures["corruptions"]:
            cells = "".join(f"{value:8.2f}" for value in row["top1"].values())
            lines.append(f"{row['name']:<{width}}{cells}{row['error']:8.2f}{_cell(row['CE']):>8}")
        clean = "" if self.clean is None else f"clean top-1 {self.clean.top1:.2f} %, "
        said = f"{clean}mean error under corruption {figures['mean_corruption_error_unnormalised']:.2f} %"
        names = dict(
            mCE="mCE (15)", mCE_19="mCE (19)", relative_mCE="relative mCE (15)", relative_mCE_19="relative mCE (19)"
        )
        said += "".join(f", {name} {figures[key]:.2f} %" for key, name in names.items() if figures[key] is not None)
        return [*lines, said]


def _cell(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.2f}"


def evaluate(prepared: Prepared, corruptions: Sequence[str], severities: Sequence[int], folder: str, world: World, clean: bool) -> Robustness:  # fmt: skip # noqa: E501
    """A network on each corruption and severity: one pass over the images each.

    Args:
        folder: in ImageNet-C's layout; "": they are made.
        clean: evaluate the images as they are, too.
    """
    config, pixels = prepared.config, prepared.loader.transform.preprocessing
    allowed = prepared.chosen if config.mask_classes else None
    whole = dataclasses.replace(pixels, crop_pct=1.0)  # corrupted images are cropped already

    def result(loader: EvalLoader) -> Result:
        shown_by = world.rank == 0
        return predict_all(
            prepared.logits, loader, prepared.num_classes, allowed, config.tta, progress=shown_by
        ).result()

    found: dict[tuple[str, int], Result] = {}
    unharmed = result(prepared.loader) if clean else None
    for corruption in corruptions:
        for severity in severities:
            if world.rank == 0:
                log.info("%s, severity %d", corruption, severity)
            dataset: ImageDataset
            if folder:
                place = find_corruption(Path(folder), corruption)
                dataset = _same_classes(config, place, str(severity), prepared.loader.dataset)
            else:
                dataset = CorruptedDataset(prepared.loader.dataset, pixels, corruption, severity)
            loader = EvalLoader(
                dataset,
                EvalTransform(whole),
                prepared.loader.batch_size,
                skip_damaged=config.val_skip_damaged,
                **builders.loader_share(config, world),
            )
            found[corruption, severity] = result(loader)
    return Robustness(config.ckpt_path, config.model, unharmed, found)


def _same_classes(config: Config, place: Path, severity: str, known: ImageDataset) -> ImageDataset:
    """The images of a severity, of the same classes as others.

    Raises:
        ConfigError: they are of other classes.
    """
    inside = dataclasses.replace(config, data_dir=str(place), val_split=severity, val_ratio=0.0)
    dataset = builders.open_validation_data(inside, dict(class_names=known.class_names))
    if dataset.class_names != known.class_names:
        missing = set(known.class_names) - set(dataset.class_names)
        unknown = set(dataset.class_names) - set(known.class_names)
        raise ConfigError(
            f"{place / severity} has other classes than the network: missing {few(sorted(missing)) or 'none'}, "
            f"unknown {few(sorted(unknown)) or 'none'}"
        )
    return dataset


def validate(config: Config, world: World) -> None:
    """`mindska validate --corruptions`: evaluates each checkpoint on each corruption; prints and writes the results.

    Every rank must call it.

    Raises:
        UserError: a checkpoint or the data cannot be used.
    """
    if task_of_file(config.ckpt_path, config.model) != "classification":
        raise ConfigError(f"corruptions are for classifiers; {config.ckpt_path} is none")
    corruptions, severities = chosen_corruptions(config.corruptions), sorted(set(config.severities))
    if not (corruptions and severities):
        raise ConfigError("corruptions and severities must name something: --corruptions all --severities 1 2 3 4 5")
    folder, clean = config.corruptions_dir, bool(config.data_dir)
    if folder:
        check_folders(Path(folder), corruptions, severities)
    else:
        check_package()
    if config.classes and folder:
        raise ConfigError("classes chooses among the validation images; with corruptions_dir, leave it out")
    shared, found = Shared(), []
    first = find_corruption(Path(folder), corruptions[0]) if folder else None
    for path in (config.ckpt_path, *config.more_ckpt_paths):
        one = dataclasses.replace(config, ckpt_path=path, more_ckpt_paths=())
        if not clean:  # the classes are those of the corrupted images
            one = dataclasses.replace(one, data_dir=str(first), val_split=str(severities[0]), val_ratio=0.0)
        prepared = prepare(one, world, shared)
        found.append(evaluate(prepared, corruptions, severities, folder, world, clean))
        if world.rank == 0:
            _write(config, found)
            print_result("\n".join(found[-1].lines()))
    if world.rank == 0 and any(each.mce(COMMON) is not None for each in found) and prepared.num_classes != 1000:
        log.info(
            "mCE divides by AlexNet's errors on ImageNet: on other classes it compares networks with each other only"
        )


def _write(config: Config, found: Sequence[Robustness]) -> None:
    """Whatever the configuration asks for, of the checkpoints so far: what is done is there if the rest fails."""
    if config.result_csv:
        header = ("ckpt_path", "model", "corruption", "severity", "top1", "top5", "loss", "images")
        rows = [
            (each.ckpt_path, each.model, name, severity, result.top1, result.top5, result.loss, result.images)
            for each in found
            for (name, severity), result in [
                *([(("none", 0), each.clean)] if each.clean else []), *each.results.items()
            ]
        ]  # fmt: skip
        write_table(Path(config.result_csv), header, rows)
    if config.result_json:
        write_json(Path(config.result_json), dict(networks=[each.figures() for each in found]))
    if config.corruptions_plot:
        draw(Path(config.corruptions_plot), found)


def draw(path: Path, found: Sequence[Robustness]) -> None:
    """Draws the error by severity, a panel a corruption, a line a network; severity 0 is the images as they were."""
    names = found[0].corruptions()
    labels = network_names([each.model for each in found], [each.ckpt_path for each in found])
    columns = min(5, len(names) + (len(names) > 1))
    panels = [*(["mean"] if len(names) > 1 else []), *names]
    figure = new_figure(2.3 * columns + 0.6, 1.9 * -(-len(panels) // columns) + 0.7)
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False, sharex=True, sharey=True).ravel()
    for place, panel in zip(axes, panels):
        for number, each in enumerate(found):
            at = each.severities()
            chosen = names if panel == "mean" else [panel]
            errors = [float(np.mean([100 - each.results[name, s].top1 for name in chosen])) for s in at]
            if each.clean is not None:
                at, errors = [0, *at], [100 - each.clean.top1, *errors]
            label = shown(labels[number], 60)
            place.plot(at, errors, "o-", markersize=3, linewidth=1, color=f"C{number % 10}", label=label)
        place.set_title(panel.replace("_", " "), fontsize=9)
        place.grid(alpha=0.3)
        place.tick_params(labelsize=7)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    figure.supxlabel("severity (0: the images as they were)", fontsize=9)
    figure.supylabel("top-1 error, %", fontsize=9)
    axes[0].set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", fontsize=8)
    save_figure(figure, path, dpi=90 if len(panels) > 10 else DPI)


__all__ = ["ALEXNET", "COMMON", "Robustness", "corrupted", "validate"]
