"""Compares runs: their curves in one picture, their best and last figures, and the settings in which they differ.

    mindska compare output/scratch output/finetuned
    mindska compare output/seed_* output/reference/seed_* --over_seeds

A run is a folder that `mindska train` has written (--ckpt_save_dir), or `mindska train_reference`. The picture goes to
compare.png, or to --out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from mindska.arguments import Parser
from mindska.errors import RunError, clear_errors
from mindska.files import check_writable, exists, user_path
from mindska.streams import print_result


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="folder of a run, with its metrics.csv")
    parser.add_argument(
        "--out", default=Path("compare.png"), type=user_path, metavar="FILE",
        help="picture to write; one that exists is replaced [%(default)s]",
    )  # fmt: skip
    parser.add_argument(
        "--over_seeds",
        action="store_true",
        help="mean and standard deviation of the runs that differ in nothing but their seed, in place of the table",
    )
    options = parser.parse_args(arguments)
    with clear_errors():
        for folder in options.runs:
            if not exists(folder / "metrics.csv"):
                there = "holds no run: it has no metrics.csv" if exists(folder) else "does not exist"
                raise RunError(f"{folder} {there}; expected the folder of a run (its --ckpt_save_dir)")
        check_writable(options.out)

    # Only now, since it loads MindSpore, which takes seconds.
    from mindska.comparison import draw, over_seeds, read_runs, table

    with clear_errors():
        runs = read_runs(options.runs)
        print_result(over_seeds(runs) if options.over_seeds else table(runs))
        try:
            draw(options.out, runs)
        except ModuleNotFoundError as error:
            print(f"no picture: {error} (pip install 'mindska[train]')", file=sys.stderr)
        else:
            print(f"curves: {options.out}", file=sys.stderr)
