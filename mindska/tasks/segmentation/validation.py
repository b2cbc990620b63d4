"""The command `mindska validate` for segmenters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from ... import builders
from ...config import Config
from ...data import check_same_on_all_ranks
from ...data.lists import write_table
from ...distributed import World, all_gather_object
from ...errors import ConfigError, WriteError, look_alike
from ...files import replacing
from ...segmentation.datasets import SegmentationDataset, open_segmentation_dataset, open_training_and_validation
from ...segmentation.evaluation import SegmentationEvaluator, SegmentationScore
from ...segmentation.metrics import ConfusionMatrix, class_table, write_class_csv
from ...streams import print_result
from ...validation import validate_each
from .opening import Segmenter, open_segmenter

DETAILS = ("path", "mIoU", "aAcc", "classes", "error")
FIGURES = ("mIoU", "mAcc", "aAcc", "mDice")


def validate(config: Config, world: World) -> None:
    """Evaluates the checkpoints that the configuration names; prints and writes the results. Every rank must call it.

    Raises:
        UserError: a checkpoint or the data cannot be used. Of several checkpoints the others are evaluated first.
    """
    validate_each(config, world, _prepare, lambda prepared: _evaluate(prepared[0], prepared[1], world))


def _prepare(config: Config) -> tuple[Segmenter, SegmentationDataset]:
    segmenter = open_segmenter(config)
    return segmenter, open_data(segmenter)


def open_data(segmenter: Segmenter) -> SegmentationDataset:
    """The validation images and masks for a segmenter.

    Raises:
        DataError: something is missing or not what it should be. ConfigError: the data is of other classes.
    """
    config = segmenter.config
    options = ("class_map", "reduce_zero_label", "exif_orientation", "allow_outside_data_dir")
    given = {name: getattr(config, name) for name in options}
    split = config.val_split
    if config.val_ratio:
        ratio = (config.val_ratio, config.val_seed)
        name = config.dataset or ""
        _, dataset = open_training_and_validation(name, config.data_dir, config.train_split, split, *ratio, **given)
        assert dataset is not None
    else:
        # The validation images alone: those for training need not be there.
        dataset = open_segmentation_dataset(config.dataset or "", config.data_dir, split, **given)
    check_same_on_all_ranks(dataset)
    dataset.check()
    known, names = segmenter.record.get("class_names"), dataset.class_names
    if known is not None and known != names:
        missing, unknown = [n for n in known if n not in names], [n for n in names if n not in known]
        what = "another order" if not (missing or unknown) else f"missing: {missing[:5]}, unknown: {unknown[:5]}"
        raise ConfigError(
            f"The checkpoint knows {len(known)} classes, the data has {len(names)} "
            f"({what}{look_alike(unknown, missing)}); expected the same, in the order of their numbers. "
            f"--class_map FILE names the data's"
        )
    if len(names) > segmenter.num_classes:
        raise ConfigError(f"The network has {segmenter.num_classes} classes, but the data has {len(names)}")
    return dataset


def open_evaluator(segmenter: Segmenter, dataset: SegmentationDataset, **share: Any) -> SegmentationEvaluator:
    """What evaluates a segmenter on a data set; `share`: num_workers, and this process's place among the ranks."""
    evaluator = SegmentationEvaluator(
        None,
        dataset,
        segmenter.transform,
        segmenter.num_classes,
        segmenter.batch_size,
        segmenter.inference,
        align_corners=segmenter.align_corners,
        **share,
    )
    evaluator.runner = segmenter.run(evaluator.graph_sizes())
    return evaluator


def _evaluate(segmenter: Segmenter, dataset: SegmentationDataset, world: World) -> dict[str, Any]:
    """Evaluates one checkpoint, writes and prints its results, and returns its row of them."""
    config, details = segmenter.config, []  # type: Config, list[tuple[int, tuple[Any, ...]]]

    def note(index: int, found: np.ndarray, mask: np.ndarray) -> None:
        alone = ConfusionMatrix(segmenter.num_classes)
        alone.update(found, mask)
        own = alone.figures()
        cells = ("" if own[name] is None else f"{own[name]:.6f}" for name in ("mIoU", "aAcc"))
        details.append((index, (dataset.describe(index), *cells, own["classes_averaged"], "")))

    evaluator = open_evaluator(segmenter, dataset, **builders.loader_share(config, world))
    evaluator.each = note if config.details else None
    score = evaluator.evaluate([lambda: None], progress=world.rank == 0)[0]
    every = [row for rows in all_gather_object(details) for row in rows]
    if world.rank == 0:
        if config.details:
            write_table(Path(config.details), DETAILS, (row for _, row in sorted(every)))
        _report(segmenter, dataset, world, score)
    figures = {name: score.figures[name] for name in FIGURES}
    return dict(ckpt_path=config.ckpt_path, model=config.model, **figures, images=score.figures["images"])


def _report(segmenter: Segmenter, dataset: SegmentationDataset, world: World, score: SegmentationScore) -> None:
    config, names = segmenter.config, [*dataset.class_names]
    names += segmenter.class_names[len(names) :]
    if config.class_csv:
        write_class_csv(Path(config.class_csv), score.figures, names)
    if config.result_json:
        facts: dict[str, Any] = dict(model=config.model, ckpt_path=config.ckpt_path, world_size=world.size)
        facts.update(preprocessing=dataclasses.asdict(segmenter.transform.preprocessing))
        facts.update(evaluation=dataclasses.asdict(segmenter.transform.evaluation_size))
        facts.update(inference=dataclasses.asdict(segmenter.inference), validation_set=dataset.identity())
        text = json.dumps({**score.figures, **facts, "class_names": names}, indent=2)
        with replacing(Path(config.result_json)) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")
    line = f"{config.ckpt_path}:\n{class_table(score.figures, names)}"
    refused = print_result(line)
    if refused and not (config.result_json or config.result_csv):
        raise WriteError(f"standard output cannot be written ({refused}); the result is\n{line}")
