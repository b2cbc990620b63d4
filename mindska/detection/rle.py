"""Masks of COCO annotations: polygons, run lengths as a list of numbers, run lengths as a string.

All decoding is pycocotools', which trusts its input: what would lead it beyond its memory is refused before.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Optional, Union

import numpy as np

from ..errors import DataError

Segmentation = Union[list[Any], dict[str, Any]]
FARTHEST = 4  # image sides beyond the image at which polygons are cut: pycocotools counts in 32 bits


class SegmentationError(ValueError):
    """A mask that cannot be read; the message says why, the caller says whose."""


def pycocotools(module: str) -> ModuleType:
    """`mask`, `coco` or `cocoeval` of pycocotools.

    Raises:
        DataError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(f"pycocotools.{module}")
    except ImportError as error:
        raise DataError(
            f"Masks and figures of COCO need pycocotools, which is not there ({error}). "
            f"Install it: pip install 'mindska[detection]'"
        ) from error


def polygons_of(segmentation: list[Any]) -> tuple[list[np.ndarray], int]:
    """The polygons of a segmentation as arrays (float64, which take a quarter of lists' memory), and how many were left
    out since they have fewer than three points.

    A list of numbers is taken for one polygon.

    Raises:
        SegmentationError: a polygon has an odd number of coordinates, or one that is no finite number.
    """
    kinds = (list, tuple, np.ndarray)
    if segmentation and not isinstance(segmentation[0], kinds):
        segmentation = [segmentation]
    polygons = []
    for polygon in segmentation:
        if not isinstance(polygon, kinds):
            raise SegmentationError(f"its segmentation has {polygon!r} where a polygon is expected")
        if len(polygon) % 2:
            raise SegmentationError(f"a polygon has {len(polygon)} numbers, which is odd: expected x, y, x, y, ...")
        if len(polygon) >= 6:
            try:
                points = np.asarray(polygon, np.float64)
            except (TypeError, ValueError):
                points = np.full(1, np.nan)
            if points.ndim != 1 or not np.isfinite(points).all():
                raise SegmentationError("a polygon has coordinates that are no finite numbers")
            polygons.append(points)
    return polygons, len(segmentation) - len(polygons)


def check_segmentation(segmentation: Any) -> tuple[Optional[Segmentation], int]:
    """The mask as it is kept, None where there is none, and how many polygons are too short to count.

    Raises:
        SegmentationError: it is neither polygons nor run lengths.
    """
    if segmentation is None or (isinstance(segmentation, (list, str)) and not segmentation):
        return None, 0
    if isinstance(segmentation, list):
        polygons, short = polygons_of(segmentation)
        return polygons or None, short
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise SegmentationError(
            f"its segmentation is {type(segmentation).__name__}; expected a list of polygons, or counts with a size"
        )
    return segmentation, 0


def to_rle(segmentation: Segmentation, size: tuple[int, int]) -> dict[str, Any]:
    """The mask as pycocotools' run lengths {"size", "counts"}.

    Args:
        size: (height, width) of the image.

    Raises:
        SegmentationError: the mask is of another size, or damaged.
        DataError: pycocotools is missing.
    """
    coco, (height, width) = pycocotools("mask"), size
    if not isinstance(segmentation, (list, dict)) or (isinstance(segmentation, dict) and "counts" not in segmentation):
        raise SegmentationError(f"its segmentation is {type(segmentation).__name__}: expected polygons or run lengths")
    if isinstance(segmentation, list):
        polygons, _ = polygons_of(segmentation)
        if not polygons:
            return coco.encode(np.zeros((height, width), np.uint8, order="F"))
        low, high = -FARTHEST * max(size), (FARTHEST + 1) * max(size)
        cut = [np.clip(polygon, low, high).tolist() for polygon in polygons]
        return coco.merge(coco.frPyObjects(cut, height, width))
    try:
        given = tuple(int(side) for side in segmentation["size"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SegmentationError("its run lengths have no size: expected [height, width]") from error
    if given != (height, width):
        turned = ", with height and width exchanged" if given == (width, height) else ""
        raise SegmentationError(
            f"its run lengths are of {'x'.join(map(str, given[::-1]))} pixels (width x height){turned}; the image has "
            f"{width}x{height}"
        )
    counts = segmentation["counts"]
    runs = counts if isinstance(counts, list) else _runs(counts)
    if not all(isinstance(run, int) and not isinstance(run, bool) and run >= 0 for run in runs):
        raise SegmentationError("its run lengths have numbers that are negative or not whole")
    if sum(runs) != height * width:
        raise SegmentationError(f"its run lengths are {sum(runs):,} pixels together; the image has {height * width:,}")
    if isinstance(counts, list):
        return coco.frPyObjects(dict(size=[height, width], counts=counts), height, width)
    return dict(size=[height, width], counts=counts.encode() if isinstance(counts, str) else counts)


def _runs(counts: Union[str, bytes]) -> list[int]:
    """The run lengths of COCO's string: six bits a character, each run from the third on as the difference to the one
    before the last."""
    if not isinstance(counts, (str, bytes)) or (isinstance(counts, str) and not counts.isascii()):
        raise SegmentationError("its run lengths are no string of COCO's")
    text = counts.encode() if isinstance(counts, str) else counts
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 30:
            raise SegmentationError("its run lengths are no string of COCO's")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise SegmentationError("its run lengths end in the middle of a number")
    return runs


def decode(segmentation: Segmentation, size: tuple[int, int]) -> np.ndarray:
    """(height, width) uint8 of 0 and 1; errors as of `to_rle`."""
    return pycocotools("mask").decode(to_rle(segmentation, size))


def encode(masks: np.ndarray) -> list[dict[str, Any]]:
    """Masks (n, H, W) of 0 and 1 as run lengths."""
    return pycocotools("mask").encode(np.asfortranarray(np.moveaxis(masks.astype(np.uint8), 0, 2)))


def as_json(rle: dict[str, Any]) -> dict[str, Any]:
    """Run lengths with text instead of bytes."""
    counts = rle["counts"]
    return dict(size=list(map(int, rle["size"])), counts=counts.decode() if isinstance(counts, bytes) else counts)
