"""Looks through a data set before it is trained on.

    mindska check_data --data_dir DATA
    mindska check_data --data_dir DATA --val_ratio 0.2 --json report.json --contact_sheet classes.png

It counts the images of every class, reads all of them, and names those that cannot be read, that are in training and
validation, in two classes, or in one class twice (by content), and those of odd sizes and kinds. The exit status is 1
when training would fail.

With --task detection it reads data in COCO's format: DATA/annotations/instances_train2017.json with DATA/train2017/, or
the files that --train_split and --val_split name; the sheet shows the objects drawn on their images.

Besides the options below it takes those of `mindska train` that are about data: --config FILE, --data_dir,
--train_split, --val_split, --val_ratio, --classes, --dataset, --batch_size, --max_damaged and so on.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Optional

from mindska.arguments import Parser
from mindska.config import Config, check_given, parse_args
from mindska.errors import DataError, clear_errors, printable
from mindska.files import check_writable, replacing, user_path


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--contact_sheet", type=user_path, metavar="FILE", help="write pictures of every class (PNG)")
    parser.add_argument("--world_size", type=int, default=1, metavar="N", help="ranks of the run to come (default: 1)")
    parser.add_argument("--task", choices=("classification", "detection"), default="classification", help="the data's")
    detection = parser.add_argument_group("of --task detection")
    detection.add_argument("--train_images", metavar="FOLDER", help="images of training (default: as COCO's layout)")
    detection.add_argument("--val_images", metavar="FOLDER", help="images of validation")
    detection.add_argument("--masks", action="store_true", help="look at the masks as well")
    detection.add_argument("--skip_missing", action="store_true", help="images that are not on disk are no fault")
    detection.add_argument("--max_boxes", type=int, default=100, metavar="N", help="objects of an image (default: 100)")
    options, others = parser.parse_known_args(arguments)
    config = parse_args(others, description=__doc__)
    with clear_errors():
        check_given(config, "data_dir")
        outputs: list[Path] = [path for path in (options.json, options.contact_sheet) if path]
        for path in outputs:
            check_writable(path)

    # Only now, since they load MindSpore, which takes seconds.
    from mindska import builders
    from mindska.data.check import Report, check, write_sheet
    from mindska.data.contact_sheet import check_sheet

    with clear_errors():
        if options.contact_sheet:
            check_sheet(options.contact_sheet)
        builders.set_up_log()
        if options.task == "detection":
            _look_at_objects(config, options)
        sets, faults = {}, []
        # Where the two do not fit together, the training images are looked through alone.
        for attempt in (config, dataclasses.replace(config, val_while_train=False)):
            try:
                train, val = builders.open_training_data(attempt)
                sets = {"train": train, **({"val": val} if val is not None else {})}
                break
            except DataError as error:
                faults.append(str(error))
        report = Report(list(dict.fromkeys(faults)))
        if sets:
            report = check(
                sets,
                config.max_damaged,
                config.val_skip_damaged,
                config.batch_size * options.world_size if "--batch_size" in others or config.model else 1,
                config.num_parallel_workers,
                faults,
            )
            if options.contact_sheet:
                count = write_sheet(options.contact_sheet, train)
                print(printable(f"{options.contact_sheet}: {count} pictures"))
        if options.json:
            with replacing(options.json) as temporary:
                temporary.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        print(report)
    sys.exit(1 if report.faults else 0)


def _look_at_objects(config: Config, options: Namespace) -> NoReturn:
    """Looks through data in COCO's format; the exit status says whether training would fail."""
    from mindska.detection.check import check_objects, open_sets, write_sheet

    sets, faults = open_sets(
        config.data_dir,
        dict(train=config.train_split, val=config.val_split if config.val_while_train else ""),
        dict(train=options.train_images, val=options.val_images),
        masks=options.masks, skip_missing=options.skip_missing, exif_orientation=config.exif_orientation,
    )  # fmt: skip
    report = check_objects(sets, options.max_boxes, config.max_damaged, faults, config.num_parallel_workers)
    if options.contact_sheet and sets:
        count = write_sheet(options.contact_sheet, next(iter(sets.values())))
        print(printable(f"{options.contact_sheet}: {count} pictures"))
    if options.json:
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    print(report)
    sys.exit(1 if report.faults else 0)
