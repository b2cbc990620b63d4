"""Reduces a training checkpoint to weights and record: MODEL-XXXXXXXX.ckpt, with the first eight digits of its sha256.

python scripts/clean_checkpoint.py run/skanet_s_best.ckpt [--no-use_ema] [--to FOLDER]
"""

from __future__ import annotations

import argparse
from typing import Optional

from mindska.errors import clear_errors, printable
from mindska.files import check_writable, sha256, user_path
from mindska.weights import open_weights
from mindska.weights.write import write_weights


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=user_path, metavar="FILE", help="training checkpoint")
    parser.add_argument("--model", default="", metavar="NAME", help="the model, where the file does not say it")
    parser.add_argument(
        "--use_ema", action=argparse.BooleanOptionalAction,
        help="keep the averaged weights, or the raw ones; default: the averaged where the file has them",
    )  # fmt: skip
    parser.add_argument("--to", type=user_path, metavar="FOLDER", help="where to write; default: beside the checkpoint")
    options = parser.parse_args(arguments)
    with clear_errors():
        folder = options.to or options.path.parent
        check_writable(folder / "_")
        weights = open_weights(options.path, options.model, options.use_ema)
        temporary = folder / f"{weights.model}-XXXXXXXX.ckpt"
        try:
            write_weights(temporary, weights.parameters, weights.record)
            target = folder / f"{weights.model}-{sha256(temporary)[:8]}.ckpt"
            temporary.replace(target)  # of the same name only when it is the same to the bit
        finally:
            temporary.unlink(missing_ok=True)
        kept = "averaged" if weights.source.averaged else "raw"
        sizes = f"{target.stat().st_size:,} bytes of {options.path.stat().st_size:,}"
        print(f"wrote {printable(target)}: the {kept} weights, {sizes}")


if __name__ == "__main__":
    main()
