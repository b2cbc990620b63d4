"""Trains the PyTorch reference of a model by a recipe, as `mindska train` trains ours, to compare the accuracies.

    mindska train_reference --config skanet_nano_fashion_mnist --data_dir DATA --seeds 1 2 3
    mindska compare OURS/seed_* output/skanet_nano_fashion_mnist_reference/seed_* --over_seeds

Initial values, batches, noise, learning rates and weight decay are those that `mindska train` has with the same seed
in one process. Needs PyTorch (`pip install torch`). Every setting of `mindska train` may be given. A line of JSON for
each evaluation goes to standard output; each seed's run, with metrics.csv and settings.json, to a folder in --out.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from mindska.arguments import Parser
from mindska.config import check_given, parse_args
from mindska.distributed import check_environment, distributed, launcher
from mindska.errors import RunError, SettingError, clear_errors
from mindska.files import exists, user_path
from mindska.streams import print_result


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = Parser(
        description=__doc__,
        allow_abbrev=False,
        usage="%(prog)s [--seeds N ...] [--threads N] [--out DIR] [--config FILE] [--key value ...]",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="a run for each; default: the recipe's seed")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="PyTorch's; default: this process's share of the cores"
    )
    parser.add_argument(
        "--out", type=user_path, metavar="DIR", help="folder of the runs, DIR/seed_N; default: ckpt_save_dir_reference"
    )
    options, rest = parser.parse_known_args(arguments)
    config = parse_args(rest, description=__doc__)
    out = options.out or Path(f"{config.ckpt_save_dir}_reference")
    runs = {seed: out / f"seed_{seed}" for seed in options.seeds or [config.seed]}
    with clear_errors():
        check_given(config, "data_dir", "model")
        check_environment()
        if options.threads is not None and options.threads < 1:
            raise SettingError(f"threads is {options.threads}; expected at least 1")
        if launcher() != "single":
            raise SettingError("The reference is trained in one process; start the command without mpirun or msrun")
        for folder in runs.values():
            if exists(folder / "metrics.csv"):
                raise RunError(f"{folder} holds a run already; choose another --out, or remove the folder")

    # Only now, since they load MindSpore, which takes seconds.
    from mindska import builders

    with clear_errors(), distributed(builders.device_target(config)) as world, clear_errors():
        try:
            from mindska.reference.training import train
        except ModuleNotFoundError as error:
            raise SettingError(f"{error}: the reference needs PyTorch (pip install torch)") from error
        for seed, folder in runs.items():
            changed = dataclasses.replace(config, seed=seed, ckpt_save_dir=str(folder))
            for row in train(changed, world, folder, options.threads):
                if "top1" in row:
                    print_result(json.dumps(row))
