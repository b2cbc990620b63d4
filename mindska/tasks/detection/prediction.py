"""Objects in image files, as pictures and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from mindspore import Tensor
from PIL import Image

from ...config import Config
from ...data.images import read_image
from ...data.loader import in_parallel
from ...dense_evaluation import Runner, common_sizes
from ...detection.evaluation import detect, run_detector
from ...detection.pictures import draw_detections, write_picture
from ...detection.postprocess import Detections
from ...detection.rle import as_json, encode
from ...errors import DataError
from ...files import check_writable
from ...modes import graph_mode
from ..segmentation.prediction import WORTH_COMPILING, file_names, image_sizes
from .opening import OpenedDetector, open_detector

SHOWN = 0.3  # least score of what is drawn and printed, unless --score_threshold says another


@dataclass(frozen=True)
class Objects:
    """What was found in one image.

    Attributes:
        objects: of each its class's number and name, score, box x1 y1 x2 y2 in pixels, and run lengths of its mask or
            None; the most certain first.
        file: the picture with them. error: why the image could not be read.
    """

    path: str
    objects: Sequence[tuple[int, str, float, list[float], Optional[dict[str, Any]]]] = ()
    file: str = ""
    error: Optional[str] = None

    HEADER = ("path", "index", "name", "score", "x1", "y1", "x2", "y2", "error")

    def lines(self) -> list[str]:
        """As text: the path, the picture, and a line an object."""
        if self.error:
            return [f"error: {self.error}"]
        said = [f"{self.path}: {self.file}" if self.file else self.path]
        for number, name, score, box, _ in self.objects:
            said.append(f"  {100 * score:6.2f} %  {name} ({number})  at {' '.join(f'{side:.1f}' for side in box)}")
        return said if self.objects else [*said, "  nothing"]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it; masks as COCO's run lengths."""
        if self.error:
            return {"path": self.path, "error": self.error}
        found = []
        for number, name, score, box, rle in self.objects:
            found.append(dict(index=number, name=name, score=score, box=box, **({"mask": rle} if rle else {})))
        return {"path": self.path, "file": self.file, "objects": found}

    def rows(self) -> list[tuple[Any, ...]]:
        """Rows of `HEADER`: one an object."""
        if self.error:
            return [(self.path, *[""] * 7, self.error)]
        return [
            (self.path, number, name, f"{score:.6f}", *(f"{side:.2f}" for side in box), "")
            for number, name, score, box, _ in self.objects
        ]


class DetectionPredictor:
    """A detector as a function of images.

    Args:
        config: `ckpt_path` and whatever else `mindska validate` would be told: `score_threshold`, `flip`, ...

    Raises:
        UserError: the file is missing, damaged, or is no detector.
    """

    def __init__(self, config: Config) -> None:
        self.detector: OpenedDetector = open_detector(config)
        self.runner = Runner(self.detector.network, self._call)

    def _call(self, network: Any, images: Tensor, prepared: Any) -> list[Detections]:
        return run_detector(network, images, prepared, self.detector.options)

    @property
    def class_names(self) -> list[str]:
        """In the order of the classes' numbers."""
        return self.detector.class_names

    def compile_for(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Has the network compiled for the sizes of images that come often; others are interpreted."""
        inputs = [self.detector.transform.padded_size(size) for size in sizes]
        self.runner = Runner(self.detector.network, self._call, common_sizes(inputs, WORTH_COMPILING))

    def __call__(self, image: Any) -> Detections:
        """The objects in an image, in its pixels, the most certain first.

        Args:
            image: a file, a Pillow image, or an array (H, W, 3) uint8 in the order RGB.

        Raises:
            DataError: it cannot be read.
        """
        with graph_mode():  # of which the runner leaves it for sizes that come seldom
            return detect(self.runner, [self.detector.transform(image)], self.detector.options)[0]


def predict_files(predictor: DetectionPredictor, paths: Sequence[str], out: Optional[Path]) -> Iterator[Objects]:
    """The objects in image files, in their order; pictures are written as they are found.

    Args:
        out: folder for `NAME.png`, the image with what was found in it.

    Raises:
        WriteError: a file cannot be written.
    """
    names, exif = file_names(paths), predictor.detector.config.exif_orientation
    predictor.compile_for(image_sizes(paths, exif))
    known = predictor.class_names

    def load(path: str) -> tuple[Optional[Image.Image], Optional[str]]:
        try:
            return read_image(path, exif_orientation=exif), None
        except DataError as error:
            return None, str(error)

    for path, (image, error) in in_parallel(load, ([path] for path in paths), lambda ids, made: (ids[0], made[0]), 2):
        if image is None:
            yield Objects(path, error=error)
            continue
        found = predictor(image)
        file = ""
        if out is not None:
            file = str(out / f"{names[path]}.png")
            write_picture(Path(file), draw_detections(image, found, known))
        masks = [as_json(rle) for rle in encode(found.masks)] if found.masks is not None and len(found) else None
        objects = [
            (int(label), known[label], float(score), [float(side) for side in box], masks[i] if masks else None)
            for i, (label, score, box) in enumerate(zip(found.labels, found.scores, np.asarray(found.boxes)))
        ]
        yield Objects(path, objects, file)


def predict_images(options: Any, paths: Sequence[str]) -> Iterator[Objects]:
    """What `mindska predict` does with a detector; options: of the command."""
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        check_writable(options.out / "picture.png")
    config = Config(
        ckpt_path=str(options.ckpt_path),
        model=options.model,
        use_ema=options.use_ema,
        score_threshold=SHOWN if options.score_threshold is None else options.score_threshold,
        flip=options.flip,
        exif_orientation=options.exif_orientation,
    )
    yield from predict_files(DetectionPredictor(config), paths, options.out)
