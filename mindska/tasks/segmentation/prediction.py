"""Label maps of image files, as files, pictures and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image

from ...config import Config
from ...data.images import ORIENTATION, open_image, read_image
from ...data.loader import in_parallel
from ...dense_evaluation import common_sizes
from ...errors import DataError, SettingError
from ...files import check_writable, replacing
from ...modes import graph_mode
from ...segmentation.evaluation import predict
from ...segmentation.pictures import overlay, write_label_map
from ...segmentation.transforms import Size
from .opening import Segmenter, open_segmenter

WORTH_COMPILING = 20  # images of one size


@dataclass(frozen=True)
class Shares:
    """What was found in one image.

    Attributes:
        classes: (number, name, share of the pixels) of the classes that it shows, the largest first.
        files: what was written of it. error: why it could not be read.
    """

    path: str
    classes: Sequence[tuple[int, str, float]] = ()
    files: Sequence[str] = ()
    error: Optional[str] = None

    HEADER = ("path", "index", "name", "share", "error")

    def lines(self) -> list[str]:
        """As text: the path, what was written, and a line a class."""
        if self.error:
            return [f"error: {self.error}"]
        classes = (f"  {100 * share:6.2f} %  {name} ({number})" for number, name, share in self.classes)
        return [f"{self.path}: {', '.join(self.files)}" if self.files else self.path, *classes]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        if self.error:
            return {"path": self.path, "error": self.error}
        classes = [dict(index=number, name=name, share=share) for number, name, share in self.classes]
        return {"path": self.path, "files": list(self.files), "classes": classes}

    def rows(self) -> list[tuple[Any, ...]]:
        """Rows of `HEADER`: one a class."""
        if self.error:
            return [(self.path, "", "", "", self.error)]
        return [(self.path, number, name, f"{share:.6f}", "") for number, name, share in self.classes]


class SegmentationPredictor:
    """A segmenter as a function of images.

    Args:
        config: `ckpt_path` and whatever else `mindska validate` would be told: `scales`, `flip`, `slide_stride`, ...

    Raises:
        UserError: the file is missing, damaged, or is no segmenter.
    """

    def __init__(self, config: Config) -> None:
        self.segmenter: Segmenter = open_segmenter(config)
        self.exif_orientation = config.exif_orientation
        self.run: Any = self.segmenter.run(())

    @property
    def class_names(self) -> list[str]:
        """In the order of the classes' numbers."""
        return self.segmenter.class_names

    def compile_for(self, sizes: Sequence[Size]) -> None:
        """Has the network compiled for the sizes of images that come often; others are interpreted."""
        if self.segmenter.inference.single and self.segmenter.inference.window is None:
            inputs = [self.segmenter.transform.evaluation_size.sizes(size)[-1] for size in sizes]
            self.run = self.segmenter.run(common_sizes(inputs, WORTH_COMPILING))

    def __call__(self, image: Any) -> np.ndarray:
        """The class of every pixel of an image, at its size: (H, W) int32.

        Args:
            image: a file, a Pillow image, or an array (H, W, 3) uint8 in the order RGB.

        Raises:
            DataError: the file cannot be read. SettingError: it is another array.
        """
        found = self.segmenter
        with graph_mode():
            return predict(self.run, image, found.transform, found.inference, found.align_corners)


def predict_files(
    predictor: SegmentationPredictor, paths: Sequence[str], out: Optional[Path], save: str = "both"
) -> Iterator[Shares]:
    """The label maps of image files, in their order; they are written as they are found.

    Args:
        out: folder for `NAME.png` (label map, palette PNG) and `NAME_overlay.png`.
        save: which of them: labels, overlay, both or none.

    Raises:
        WriteError: a file cannot be written.
    """
    names = file_names(paths)
    predictor.compile_for(image_sizes(paths, predictor.exif_orientation))
    known = predictor.class_names

    def load(path: str) -> tuple[Optional[Image.Image], Optional[str]]:
        try:
            return read_image(path, exif_orientation=predictor.exif_orientation), None
        except DataError as error:
            return None, str(error)

    def single(ids: Sequence[str], samples: list[Any]) -> Any:
        return ids[0], samples[0]

    for path, (image, error) in in_parallel(load, ([path] for path in paths), single, 2):
        if image is None:
            yield Shares(path, error=error)
            continue
        labels = predictor(image)
        files = []
        if out is not None and save in ("labels", "both"):
            files.append(out / f"{names[path]}.png")
            write_label_map(files[-1], labels)
        if out is not None and save in ("overlay", "both"):
            files.append(out / f"{names[path]}_overlay.png")
            with replacing(files[-1]) as temporary:
                overlay(image, labels, known).save(temporary, format="PNG")
        numbers, counts = np.unique(labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        classes = [(int(numbers[i]), known[numbers[i]], float(counts[i] / labels.size)) for i in order]
        yield Shares(path, classes, [str(file) for file in files])


def file_names(paths: Sequence[str]) -> dict[str, str]:
    """What the files of each image are called: its stem, with a number where that comes again."""
    taken: Counter[str] = Counter()
    names = {}
    for path in paths:
        stem = Path(path).stem
        taken[stem] += 1
        names[path] = stem if taken[stem] == 1 else f"{stem}_{taken[stem]}"
    return names


def image_sizes(paths: Sequence[str], exif_orientation: bool) -> list[Size]:
    """(height, width) of each image, by the beginnings of the files; none where there are too few to compile for."""
    sizes = []
    for path in paths if len(paths) >= WORTH_COMPILING else ():
        try:
            with open_image(path) as image:
                turned = exif_orientation and image.getexif().get(ORIENTATION, 1) in range(5, 9)
                sizes.append((image.width, image.height) if turned else (image.height, image.width))
        except DataError:  # it is reported when it is read
            continue
    return sizes


def predict_images(options: Any, paths: Sequence[str]) -> Iterator[Shares]:
    """What `mindska predict` does with a segmenter; options: of the command.

    Raises:
        SettingError: there is something to write, but no folder is named.
    """
    if options.out is None and options.save != "none":
        raise SettingError(
            f"{options.ckpt_path} is a segmenter: what it finds are pictures. Name a folder for them with --out DIR "
            f"(or --save none)"
        )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        check_writable(options.out / "labels.png")
    settings = dict(scales=tuple(options.scales), flip=options.flip, exif_orientation=options.exif_orientation)
    if options.slide_stride:
        settings.update(slide_stride=tuple(options.slide_stride))
    config = Config(ckpt_path=str(options.ckpt_path), model=options.model, use_ema=options.use_ema, **settings)
    yield from predict_files(SegmentationPredictor(config), paths, options.out, options.save)
