"""Averages the weights of several checkpoints of one model (batch-norm statistics as well), as timm's script does.

    mindska average output/skanet_s/skanet_s-*_*.ckpt --to mean.ckpt [--no-use_ema]

Files that do not belong together (other classes, pixels, options, kinds of weights) are refused, with what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from mindska.arguments import Parser, add_model, add_overwrite, add_use_ema
from mindska.errors import SettingError, clear_errors, formatted_list, printable
from mindska.files import check_target, check_there, user_path
from mindska.names import OUR_NETWORKS


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__, aliases={"--ckpt_path": ""})
    parser.add_argument("paths", nargs="+", type=user_path, metavar="FILE", help="checkpoints of one model")
    parser.add_argument(
        "--to", required=True, type=user_path, metavar="OUT", help=".ckpt, .safetensors or .pth to write"
    )
    add_model(parser, OUR_NETWORKS, "the model, where the files do not say it")
    add_use_ema(parser, "take")
    add_overwrite(parser)
    options = parser.parse_args(arguments)
    with clear_errors():
        check_target(options.to, options.overwrite)
        for path in options.paths:
            check_there(path, "checkpoint")

    # Only now, since they load MindSpore, which takes seconds.
    import numpy as np
    from tqdm import tqdm

    from mindska.weights import Weights, open_weights
    from mindska.weights.alike import unlike
    from mindska.weights.write import write_weights

    with clear_errors():
        sums: dict[str, np.ndarray] = {}
        first: Optional[Weights] = None
        sources, class_names = [], None
        for path in tqdm(options.paths, unit="file", disable=len(options.paths) < 3):
            weights = open_weights(path, options.model or (first.model if first else ""), options.use_ema)
            if first is None:
                first = weights
                sums = {name: np.zeros(value.shape, np.float64) for name, value in weights.parameters.items()}
            if differences := unlike(first, weights):
                raise SettingError(
                    f"{path} and {first.source.path} do not belong together: only checkpoints of one network can be "
                    f"averaged." + formatted_list("what differs", differences)
                )
            record = weights.record
            sources.append(record["source"])
            class_names = class_names or record.get("class_names")
            for name, value in weights.parameters.items():
                sums[name] += value
        assert first is not None  # at least one path is given
        record = {k: v for k, v in first.record.items() if k not in ("epoch", "metric", "top1", "source")}
        record.update(mean_of=sources, **({"class_names": class_names} if class_names else {}))
        mean = {name: (value / len(sources)).astype(np.float32) for name, value in sums.items()}
        write_weights(options.to, mean, record)
        kind = "averaged (EMA)" if first.source.averaged else "raw"
        print(
            f"wrote {printable(options.to)}: the mean of the {kind} weights of {len(sources)} checkpoints of "
            f"{record['model']}; validate it before use"
        )
