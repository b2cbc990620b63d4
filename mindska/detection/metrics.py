"""COCO's figures of detections, by pycocotools, and results in COCO's JSON.

The figures are those of pycocotools, with these differences where it gives none: the main AP is that at the largest of
`max_detections`, which may be another than 100; a figure without ground truth is nan, and never -1; annotations are
numbered from 1, since pycocotools takes the number 0 for none.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from ..errors import DataError, SettingError, few, printable
from ..files import replacing
from .coco import CocoDataset
from .coco_file import read_json
from .postprocess import Detections
from .rle import as_json, encode, pycocotools, to_rle

log = logging.getLogger("mindska")

MAX_DETECTIONS = (1, 10, 100)
AREAS = ("all", "small", "medium", "large")  # in pycocotools' order: from 0, up to 32^2, up to 96^2, beyond


class CocoEvaluator:
    """Collects detections, image by image, and compares them with the objects of a data set.

    Every image counts once: of an image that comes again (ranks pad their last batch) the first detections count.
    An image without detections, and one without objects, counts too.

    Args:
        kinds: "bbox", "segm" or both.
        max_detections: of an image and class, rising; the last one is that of the main AP, the others of recall.

    Raises:
        SettingError: an unknown kind, or numbers that do not rise.
        DataError: pycocotools is missing, or masks are wanted of a data set that was opened without.
    """

    def __init__(
        self, dataset: CocoDataset, kinds: Sequence[str] = ("bbox",), max_detections: Sequence[int] = MAX_DETECTIONS
    ) -> None:
        if not kinds or set(kinds) - {"bbox", "segm"}:
            raise SettingError(f"The kinds of figures are {list(kinds)}; expected bbox, segm or both")
        limits = [int(limit) for limit in max_detections]
        if not limits or limits[0] < 1 or sorted(set(limits)) != limits:
            raise SettingError(f"max_detections is {list(max_detections)}; expected rising numbers from 1 on")
        pycocotools("mask")
        if "segm" in kinds and not dataset.with_masks:
            raise DataError(f"{dataset.annotation_file} was opened without its masks, and segm needs them")
        self.dataset, self.kinds, self.limits = dataset, tuple(kinds), limits
        # Image -> its boxes x, y, w, h (n, 4) float64, scores (n,), labels (n,), run lengths [n] or None.
        self.found: dict[int, dict[str, Any]] = {}
        crowded = int((np.bincount(dataset.objects_of[~dataset.crowd]) > limits[-1]).sum())
        if crowded:
            log.warning(
                "%s: %s images have more objects than the %s detections of an image that count; raise max_detections",
                dataset.split, f"{crowded:,}", limits[-1],
            )  # fmt: skip

    def update(self, index: int, detections: Detections) -> None:
        """Adds the detections of image `index`, in its original pixels."""
        if index in self.found:
            return
        boxes = np.asarray(detections.boxes, np.float64).reshape(-1, 4)
        masks = detections.masks if "segm" in self.kinds else None
        if "segm" in self.kinds and masks is None and len(boxes):
            raise DataError("segm needs masks, and the detections have none: is the method one for masks?")
        self.found[index] = dict(
            boxes=np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1),
            scores=np.asarray(detections.scores, np.float64),
            labels=np.asarray(detections.labels, np.int64),
            rles=None if masks is None else encode(masks) if len(masks) else [],
        )

    def state(self) -> dict[int, dict[str, Any]]:
        """What this rank has found: to send to another, and `merge` there."""
        return self.found

    def merge(self, states: Iterable[dict[int, dict[str, Any]]]) -> None:
        """Adds what others have found; an image that is there already stays as it is."""
        for state in states:
            for index, found in state.items():
                self.found.setdefault(int(index), found)

    def add_results(self, results: list[dict[str, Any]], path: Optional[Path] = None) -> None:
        """Adds results as COCO's JSON has them; images that they do not name have no detections.

        Raises:
            DataError: they name images or categories that the data set does not have, or are no results.
        """
        where, dataset = path or "The results", self.dataset
        index_of = {image: i for i, image in enumerate(dataset.image_ids)}
        label_of = {category: i for i, category in enumerate(dataset.category_ids)}
        try:
            for name, key, known in (("images", "image_id", index_of), ("categories", "category_id", label_of)):
                strange = list(dict.fromkeys(result[key] for result in results if result[key] not in known))
                if strange:
                    raise DataError(
                        f"{where}: {len(strange):,} {name} are not in {dataset.annotation_file}: {few(strange, 5)}; "
                        f"it has {few(known, 5)}"
                    )
            rows: dict[int, list[dict]] = {i: [] for i in range(len(dataset))}
            for result in results:
                rows[index_of[result["image_id"]]].append(result)
            for index, some in rows.items():
                width, height = dataset.widths_heights[index].tolist()
                without = (0, 0, 0, 0)  # of masks alone
                boxes = [result["bbox"] if "bbox" in self.kinds else result.get("bbox", without) for result in some]
                found: dict[str, Any] = dict(
                    boxes=np.asarray(boxes, np.float64).reshape(len(some), 4),
                    scores=np.asarray([result["score"] for result in some], np.float64).reshape(len(some)),
                    labels=np.asarray([label_of[result["category_id"]] for result in some], np.int64),
                    rles=None,
                )
                if not (np.isfinite(found["boxes"]).all() and np.isfinite(found["scores"]).all()):
                    raise ValueError(f"of image {dataset.image_ids[index]} there are numbers that are not finite")
                if "segm" in self.kinds:
                    found["rles"] = [to_rle(result["segmentation"], (height, width)) for result in some]
                self.found[index] = found
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{where}: no results of COCO's ({type(error).__name__}: {error}): expected a list of objects with "
                f"image_id, category_id, bbox or segmentation, and score"
            ) from error

    # ------------------------------------------------------------------------------------ figures

    def figures(self) -> dict[str, Any]:
        """The figures of what was found so far, as fractions, nan where there is no ground truth.

        Returns:
            for each kind: AP, AP50, AP75, AP_small, AP_medium, AP_large, AR_1, AR_10, AR_100 (by `max_detections`),
            AR_small, AR_medium, AR_large, and AP_per_category (class -> AP); "images" and "objects", how many counted;
            "max_detections"; and "messages", sentences for people.
        """
        indices = sorted(self.found)
        truth = [self._truth(index) for index in indices]
        objects = sum(not annotation["iscrowd"] for some in truth for annotation in some)
        result: dict[str, Any] = {kind: self._evaluate(kind, indices, truth) for kind in self.kinds}
        result.update(images=len(indices), objects=objects, max_detections=list(self.limits), messages=[])
        dataset, messages = self.dataset, result["messages"]
        messages.append(
            f"{len(indices):,} images with {objects:,} objects; at most {self.limits[-1]} detections of an image and "
            f"class count"
        )
        if len(indices) < len(dataset):
            messages.append(f"{len(dataset) - len(indices):,} images of {dataset.split} were not looked at")
        if not objects:
            messages.append(
                f"no ground truth of any class in {dataset.annotation_file}: the figures are n/a"
                + (" (all its objects are crowds)" if any(truth) else "")
            )
        elif not any(len(self.found[index]["scores"]) for index in indices):
            messages.append("nothing was detected in any image")
        return result

    def _truth(self, index: int) -> list[dict[str, Any]]:
        """The objects of an image as pycocotools takes them; boxes as the file has them."""
        dataset, result = self.dataset, []
        for number in dataset.objects(index).numbers.tolist():
            annotation = dict(
                image_id=index,
                category_id=int(dataset.object_labels[number]),
                bbox=dataset.boxes[number].tolist(),
                area=dataset.area(number),
                iscrowd=int(dataset.crowd[number]),
            )
            if "segm" in self.kinds:
                annotation["segmentation"] = dataset.rle(number)
            result.append(annotation)
        return result

    def _evaluate(self, kind: str, indices: list[int], truth: list[list[dict]]) -> dict[str, Any]:
        sizes = self.dataset.widths_heights.tolist()
        images = [dict(id=index, width=sizes[index][0], height=sizes[index][1]) for index in indices]
        categories = [dict(id=label, name=name) for label, name in enumerate(self.dataset.class_names)]
        annotations, area = [], pycocotools("mask").area
        for index in indices:
            found = self.found[index]
            for i, (box, score, label) in enumerate(zip(found["boxes"], found["scores"], found["labels"])):
                annotation: dict[str, Any] = dict(image_id=index, category_id=int(label), score=float(score), iscrowd=0)
                annotation["bbox"] = box.tolist()
                # A mask's size is the mask's, not its box's: it decides what is small, medium and large.
                annotation["area"] = float(box[2] * box[3] if kind == "bbox" else area(_in_bytes(found["rles"][i])))
                if kind == "segm":
                    annotation["segmentation"] = _in_bytes(found["rles"][i])
                annotations.append(annotation)
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
            evaluation = pycocotools("cocoeval").COCOeval(
                _coco(images, categories, [one for some in truth for one in some]),
                _coco(images, categories, annotations),
                kind,
            )
            evaluation.params.maxDets = list(self.limits)
            evaluation.evaluate()
            evaluation.accumulate()
        return self._summary(evaluation.eval["precision"], evaluation.eval["recall"], evaluation.params.iouThrs)

    def _summary(self, precision: np.ndarray, recall: np.ndarray, thresholds: np.ndarray) -> dict[str, Any]:
        """From precision (thresholds, recalls, classes, areas, limits), and recall without the second axis."""
        figures: dict[str, Any] = dict(AP=_mean(precision[:, :, :, 0, -1]))
        for threshold in (0.5, 0.75):
            at = np.isclose(thresholds, threshold)
            figures[f"AP{threshold * 100:.0f}"] = _mean(precision[at, :, :, 0, -1])
        for i, area in enumerate(AREAS[1:], 1):
            figures[f"AP_{area}"] = _mean(precision[:, :, :, i, -1])
        for i, limit in enumerate(self.limits):
            figures[f"AR_{limit}"] = _mean(recall[:, :, 0, i])
        for i, area in enumerate(AREAS[1:], 1):
            figures[f"AR_{area}"] = _mean(recall[:, :, i, -1])
        figures["AP_per_category"] = {
            name: _mean(precision[:, :, label, 0, -1]) for label, name in enumerate(self.dataset.class_names)
        }
        return figures

    # ------------------------------------------------------------------------------------ results

    def results(self) -> list[dict[str, Any]]:
        """What was found, as COCO's JSON: ids are those of the annotation file, boxes x, y, w, h in original pixels."""
        dataset, results = self.dataset, []
        for index in sorted(self.found):
            found = self.found[index]
            for i, (box, score, label) in enumerate(zip(found["boxes"], found["scores"], found["labels"])):
                result: dict[str, Any] = dict(
                    image_id=dataset.image_ids[index],
                    category_id=dataset.category_ids[int(label)],
                    bbox=[round(float(value), 3) for value in box],
                    score=round(float(score), 6),
                )
                if found["rles"] is not None:
                    result["segmentation"] = as_json(found["rles"][i])
                results.append(result)
        return results

    def write_results(self, path: Path) -> None:
        """Writes `results` to a file, whole or not at all; WriteError where it cannot be written."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.results()), encoding="utf-8")

    def read_results(self, path: Path) -> None:
        """`add_results` of a file."""
        results = read_json(path)
        if not isinstance(results, list):
            raise DataError(f"{path} holds {type(results).__name__}; expected a list of results")
        self.add_results(results, path)


def _coco(images: list[dict], categories: list[dict], annotations: list[dict]) -> Any:
    """An object of pycocotools, with annotations numbered from 1: it takes the number 0 for no match."""
    coco = pycocotools("coco").COCO()
    numbered = [dict(annotation, id=i) for i, annotation in enumerate(annotations, 1)]
    coco.dataset = dict(images=images, categories=categories, annotations=numbered)
    coco.createIndex()
    return coco


def _in_bytes(rle: dict[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return dict(size=rle["size"], counts=counts.encode() if isinstance(counts, str) else counts)


def _mean(values: np.ndarray) -> float:
    """Of those that are there: pycocotools has -1 where there is no ground truth."""
    there = values[values > -1]
    return float(np.mean(there)) if there.size else float("nan")


def table(figures: dict[str, Any], per_class: bool = False) -> str:
    """The figures as text, in per cent; n/a where there is no ground truth."""
    lines = []
    for kind in ("bbox", "segm"):
        if kind in figures:
            shown = {name: value for name, value in figures[kind].items() if name != "AP_per_category"}
            lines.append(f"{kind}: " + "  ".join(f"{name} {_percent(value)}" for name, value in shown.items()))
            if per_class:
                classes = figures[kind]["AP_per_category"]
                width = max(map(len, classes), default=0)
                lines += [f"  {name:{width}} {_percent(value)}" for name, value in classes.items()]
    return printable("\n".join([*lines, *figures["messages"]]), keep="\n")


def _percent(value: float) -> str:
    return "n/a" if np.isnan(value) else f"{100 * value:.1f}"
