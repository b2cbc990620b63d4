"""Reduces a training checkpoint to weights and record: MODEL-XXXXXXXX.ckpt, with the first eight digits of its sha256.

mindska clean run/skanet_s_best.ckpt [--no-use_ema] [--to FOLDER]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from mindska.arguments import Parser, add_model, add_use_ema
from mindska.errors import clear_errors, printable
from mindska.files import check_there, check_writable, sha256, user_path
from mindska.names import OUR_NETWORKS


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__, aliases={"--ckpt_path": ""})
    parser.add_argument("path", type=user_path, metavar="FILE", help="training checkpoint")
    add_model(parser, OUR_NETWORKS, "the model, where the file does not say it")
    add_use_ema(parser, "keep")
    parser.add_argument("--to", type=user_path, metavar="FOLDER", help="where to write; default: beside the checkpoint")
    options = parser.parse_args(arguments)
    with clear_errors():
        folder = options.to or options.path.parent
        check_writable(folder / "_")
        check_there(options.path, "checkpoint")

    # Only now, since they load MindSpore, which takes seconds.
    from mindska.weights import open_weights
    from mindska.weights.write import write_weights

    with clear_errors():
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
