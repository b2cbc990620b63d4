"""The command `mindska validate` for detectors."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ... import builders
from ...config import Config
from ...data.lists import write_table
from ...detection.coco import CocoDataset
from ...detection.coco_file import Category
from ...detection.evaluation import DetectionEvaluator, DetectionScore
from ...distributed import World
from ...errors import ConfigError, WriteError, look_alike
from ...files import replacing
from ...streams import print_result
from ...validation import validate_each
from .opening import OpenedDetector, open_detector
from .task import limits, open_set


def validate(config: Config, world: World) -> None:
    """Evaluates the checkpoints that the configuration names; prints and writes the results. Every rank must call it.

    Raises:
        UserError: a checkpoint or the data cannot be used. Of several checkpoints the others are evaluated first.
    """
    validate_each(config, world, _prepare, lambda prepared: _evaluate(prepared[0], prepared[1], world))


def _prepare(config: Config) -> tuple[OpenedDetector, CocoDataset]:
    detector = open_detector(config)
    dataset = open_set(detector.config, "val", detector.has_masks)
    known, names = detector.record.get("class_names"), dataset.class_names
    if known is None:
        if len(names) != detector.num_classes:
            raise ConfigError(
                f"{config.ckpt_path} has {detector.num_classes} classes and does not say which; the data has "
                f"{len(names)}"
            )
        return detector, dataset
    missing, unknown = [n for n in known if n not in names], [n for n in names if n not in known]
    if unknown:
        raise ConfigError(
            f"The checkpoint knows {len(known)} classes, the data has {len(names)}: missing in the data: "
            f"{missing[:5]}, unknown to the checkpoint: {unknown[:5]}{look_alike(unknown, missing)}"
        )
    if known != names:  # by their names, whatever their order in the file
        by_name = {category.name: category for category in dataset.categories}
        free = iter(range(max((c.id for c in dataset.categories if isinstance(c.id, int)), default=0) + 1, 1 << 31))
        categories = [by_name.get(name) or Category(next(free), name) for name in known]
        dataset = open_set(detector.config, "val", detector.has_masks, categories)
    return detector, dataset


def _evaluate(detector: OpenedDetector, dataset: CocoDataset, world: World) -> dict[str, Any]:
    """Evaluates one checkpoint, writes and prints its results, and returns its row of them."""
    config = detector.config
    evaluator = DetectionEvaluator(
        detector.network,
        dataset,
        detector.transform,
        config.batch_size,
        detector.options,
        ("bbox", "segm") if detector.has_masks else ("bbox",),
        limits(config),
        **builders.loader_share(config, world),
    )
    key = repr((config.model, detector.num_classes, detector.record.get("network"), config.amp_level))
    score = evaluator.evaluate([lambda: None], key, progress=world.rank == 0)[0]
    if world.rank == 0:
        _report(detector, evaluator, world, score)
    columns = {name: value / 100 for name, value in score.columns().items()}
    return dict(ckpt_path=config.ckpt_path, model=config.model, **columns, images=score.figures["images"])


def _report(detector: OpenedDetector, evaluator: DetectionEvaluator, world: World, score: DetectionScore) -> None:
    config, figures = detector.config, _numbers(score.figures)
    if config.class_csv:
        kinds = [kind for kind in ("bbox", "segm") if kind in figures]
        rows = ([name, *(figures[kind]["AP_per_category"][name] for kind in kinds)] for name in detector.class_names)
        write_table(Path(config.class_csv), ["class", *(f"{kind}_AP" for kind in kinds)], rows)
    if config.details:
        evaluator.found[0].write_results(Path(config.details))
    if config.result_json:
        facts: dict[str, Any] = dict(model=config.model, ckpt_path=config.ckpt_path, world_size=world.size)
        facts.update(transform=dataclasses.asdict(detector.transform), options=dataclasses.asdict(detector.options))
        text = json.dumps({**figures, **facts, "validation_set": evaluator.dataset.identity()}, indent=2)
        with replacing(Path(config.result_json)) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")
    line = f"{config.ckpt_path}:\n{score.table()}"
    refused = print_result(line)
    if refused and not (config.result_json or config.result_csv):
        raise WriteError(f"standard output cannot be written ({refused}); the result is\n{line}")


def _numbers(value: Any) -> Any:
    """JSON has no nan: None in its place."""
    if isinstance(value, dict):
        return {name: _numbers(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
