"""Looks through a data set before it is trained on.

    mindska check_data --data_dir DATA
    mindska check_data --data_dir DATA --val_ratio 0.2 --json report.json --contact_sheet classes.png

It counts the images of every class, reads all of them, and names those that cannot be read, that are in training and
validation, in two classes, or in one class twice (by content), and those of odd sizes and kinds. The exit status is 1
when training would fail.

With --task segmentation it reads all masks as well, and tells the pixels of every class, images without a mask, masks
of another size or kind, and numbers that are none of a class; the sheet shows masks over their images.

With --task detection it reads data in COCO's format: DATA/annotations/instances_train2017.json with DATA/train2017/, or
the files that --train_split and --val_split name; the sheet shows the objects drawn on their images.

Besides the options below it takes those of `mindska train` that are about data: --config FILE, --data_dir,
--train_split, --val_split, --val_ratio, --classes, --dataset, --batch_size, --max_damaged and so on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Optional

from mindska.arguments import Parser
from mindska.config import check_given, parse_args
from mindska.errors import clear_errors, printable
from mindska.files import check_writable, replacing, user_path


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--contact_sheet", type=user_path, metavar="FILE", help="write pictures of every class (PNG)")
    parser.add_argument("--world_size", type=int, default=1, metavar="N", help="ranks of the run to come (default: 1)")
    detection = parser.add_argument_group("of --task detection")
    detection.add_argument("--masks", action="store_true", help="look at the masks as well")
    options, others = parser.parse_known_args(arguments)
    config = parse_args(others, description=__doc__)
    with clear_errors():
        check_given(config, "data_dir")
        for path in (options.json, options.contact_sheet):
            if path:
                check_writable(path)

    # Only now, since they load MindSpore, which takes seconds.
    from mindska import builders
    from mindska.data.contact_sheet import check_sheet
    from mindska.tasks.checking import check_data

    with clear_errors():
        if options.contact_sheet:
            check_sheet(options.contact_sheet)
        builders.set_up_log()
        found = check_data(config, options)
        if options.contact_sheet and found.write_sheet:
            print(printable(f"{options.contact_sheet}: {found.write_sheet(options.contact_sheet)} pictures"))
        if options.json:
            with replacing(options.json) as temporary:
                temporary.write_text(json.dumps(found.report.to_json(), indent=1) + "\n", encoding="utf-8")
        print(found.text)
    sys.exit(1 if found.report.faults else 0)
