"""Averages the weights of several checkpoints of one model (batch-norm statistics as well), as timm's script does.

python scripts/average_checkpoints.py output/skanet_s/skanet_s-*_*.ckpt --to mean.ckpt [--use_ema]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Optional

import numpy as np
from tqdm import tqdm

from mindska.errors import SettingError, clear_errors
from mindska.weights import open_weights
from mindska.weights.write import check_target, write_weights


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE", help="checkpoints of one model")
    parser.add_argument("--to", required=True, type=Path, metavar="OUT", help=".ckpt, .safetensors or .pth to write")
    parser.add_argument("--model", default="", metavar="NAME", help="the model, where the files do not say it")
    parser.add_argument("--use_ema", action="store_true", help="average the averaged (EMA) weights, not the raw ones")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
    options = parser.parse_args(arguments)
    with clear_errors():
        check_target(options.to, options.overwrite)
        sums: dict[str, np.ndarray] = {}
        record: dict = {}
        sources = []
        for path in tqdm(options.paths, unit="file", disable=len(options.paths) < 3):
            weights = open_weights(path, options.model or record.get("model", ""), options.use_ema)
            sources.append(weights.record()["source"])
            if not sums:
                record, first = weights.record(), path
                sums = {name: value.astype(np.float64) for name, value in weights.parameters.items()}
                continue
            if weights.num_classes != record["num_classes"]:
                raise SettingError(
                    f"{path} has {weights.num_classes} classes, but {first} has {record['num_classes']}: "
                    f"only checkpoints of one network can be averaged"
                )
            for name, value in weights.parameters.items():
                sums[name] += value
        for name in ("epoch", "metric", "top1", "source"):
            record.pop(name, None)
        record["mean_of"] = sources
        mean = {name: (value / len(sources)).astype(np.float32) for name, value in sums.items()}
        write_weights(options.to, mean, record)
        print(
            f"wrote {options.to}: the mean of {len(sources)} checkpoints of {record['model']}; validate it before use"
        )


if __name__ == "__main__":
    main()
