"""Shows what is in a file of weights: kind, model, record, checksum, and every name with its shape.

mindska inspect FILE [--keys] [--no-use_ema]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from mindska.arguments import Parser, add_use_ema
from mindska.errors import clear_errors, few, printable
from mindska.files import check_there, user_path
from mindska.names import OUR_MODELS


def contents(path: Path) -> str:
    """A line on the groups of a checkpoint of ours: weights, averaged weights, training state."""
    from mindska.weights.convert import EMA_PREFIX, STATE_PREFIX
    from mindska.weights.files import read_file

    arrays, _ = read_file(path)
    groups = {"averaged": EMA_PREFIX, "training state": STATE_PREFIX}
    counts = {group: sum(name.startswith(prefix) for name in arrays) for group, prefix in groups.items()}
    plain = len(arrays) - sum(counts.values())
    return ", ".join([f"{plain} weights", *(f"{count} of {group}" for group, count in counts.items() if count)])


def finite(value: Any) -> bool:
    """Whether no value of an array or a tensor is NaN or infinite, as far as it has values that can be read."""
    import numpy as np

    from mindska.weights.convert import as_float32, value_problem

    if value_problem(value):
        return True
    return bool(np.isfinite(as_float32(value)).all())


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__, aliases={"--ckpt_path": ""})
    parser.add_argument("path", type=user_path, metavar="FILE", help="PyTorch, safetensors, Caffe or MindSpore")
    add_use_ema(parser, "show")
    parser.add_argument("--keys", action="store_true", help="list every name with its shape and type")
    options = parser.parse_args(arguments)
    with clear_errors():
        check_there(options.path, "checkpoint")

    # Only now, since they load MindSpore, which takes seconds.
    import yaml

    from mindska.weights.convert import models_that_fit
    from mindska.weights.source import open_source
    from mindska.weights.wrappers import is_array

    with clear_errors():
        source = open_source(options.path, options.use_ema)
        record = dict(source.record)
        progress = record.pop("progress", None)
        model = record.get("model") or " or ".join(
            models_that_fit(source.arrays, *source.frameworks, beside=source.named.beside)
        )
        arrays = {name: value for name, value in source.arrays.items() if is_array(value)}
        others = {name: type(value).__name__ for name, value in source.arrays.items() if name not in arrays}
        values = sum(math.prod(value.shape) for value in arrays.values())
        print(f"file:     {printable(source.path)} ({source.size:,} bytes)")
        print(f"sha256:   {source.sha256}")
        print(f"kind:     {source.kind}{' (checksum right)' if source.kind == 'MindSpore' and record else ''}")
        print(f"model:    {printable(model) or 'none of mindska: ' + ', '.join(sorted(OUR_MODELS)[:3]) + ', ...'}")
        if source.kind == "MindSpore":
            print(f"holds:    {contents(options.path)}")
        print(f"weights:  {len(arrays)} tensors, {values:,} values{', averaged' if source.averaged else ''}")
        if source.choice:
            print(f"note:     {printable(source.choice)}")
        damaged = [name for name, value in arrays.items() if not finite(value)]
        if damaged:
            print(f"damaged:  {len(damaged)} tensors have values that are NaN or infinite: {few(damaged)}")
        if others:
            print(f"also:     {few(f'{name} ({kind})' for name, kind in others.items())}")
        if source.named.left_out:
            print(f"training: {len(source.named.left_out)} are a training's state: {few(source.named.left_out)}")
        if record:
            if record.get("class_names") and len(record["class_names"]) > 10:
                names = record["class_names"]
                record["class_names"] = [*names[:5], f"... {len(names) - 6} more ...", names[-1]]
            text = yaml.safe_dump(record, default_flow_style=None, sort_keys=False, allow_unicode=True, width=100)
            print("record:\n  " + printable(text.strip(), keep="\n").replace("\n", "\n  "))
        if progress:
            known = progress if isinstance(progress, dict) else {}
            print(f"progress: { ({k: v for k, v in known.items() if not isinstance(v, (list, dict))}) }")
        if options.keys:
            for name, value in arrays.items():
                print(f"  {printable(name)} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")
