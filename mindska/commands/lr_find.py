"""Learning-rate range test: trains a little while the learning rate rises, and shows where the loss falls most.

    mindska lr_find --config skanet_nano_digits --data_dir DATA

Every setting of `mindska train` may be given; --lr and the schedule have no effect. Writes lr_find.csv and lr_find.png
into --out, and prints the learning rate at which the loss falls most steeply. The weights are not kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from mindska.arguments import Parser
from mindska.config import check_given, parse_args
from mindska.distributed import check_environment, distributed
from mindska.errors import clear_errors
from mindska.files import check_writable, user_path
from mindska.streams import print_result, unfailing_stderr


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = Parser(
        description=__doc__,
        allow_abbrev=False,
        usage="%(prog)s [--start_lr X] [--end_lr X] [--updates N] [--out DIR] [--config FILE] [--key value ...]",
    )
    parser.add_argument("--start_lr", type=float, default=1e-6, metavar="X", help="first learning rate [%(default)s]")
    parser.add_argument("--end_lr", type=float, default=1.0, metavar="X", help="last learning rate [%(default)s]")
    parser.add_argument("--updates", type=int, default=100, metavar="N", help="updates in between [%(default)s]")
    parser.add_argument("--out", type=user_path, metavar="DIR", help="folder to write to; default: ckpt_save_dir")
    options, rest = parser.parse_known_args(arguments)
    config = parse_args(rest, description=__doc__)
    out = options.out or Path(config.ckpt_save_dir)
    with clear_errors():
        check_given(config, "data_dir", "model")
        check_environment()
        out.mkdir(parents=True, exist_ok=True)
        for name in ("lr_find.csv", "lr_find.png"):
            check_writable(out / name)

    # Only now, since they load MindSpore, which takes seconds.
    from tqdm import tqdm

    from mindska import builders
    from mindska.tasks import create_task
    from mindska.training import TrainStep, build_optimizer
    from mindska.training.lr_find import draw, range_test, rising_rates, suggestion, write

    with clear_errors(), distributed(builders.device_target(config)) as world, clear_errors():
        rates = rising_rates(options.start_lr, options.end_lr, options.updates)
        builders.set_up(config, world)
        task = create_task(config, world)
        weights = builders.configured_weights(config)
        task.open_data(validation=False)
        network = task.build_network(task.fit_weights(weights), weights.record if weights else {})
        loader = task.train_loader(network)
        optimizer = build_optimizer(config, network, rates)
        options_of_step = builders.build_step_options(config)
        step = TrainStep(network, task.loss(), optimizer, options_of_step, world.size).set_train(True)
        tested = range_test(step, loader.batches(), rates, config.gradient_accumulation_steps)
        shown = None if world.rank == 0 else True
        points = list(tqdm(tested, total=len(rates), unit="update", disable=shown, file=unfailing_stderr()))
        if world.rank == 0:
            write(out / "lr_find.csv", points)
            steepest, lowest = suggestion(points)
            draw(out / "lr_find.png", points, steepest, config)
            print_result(
                f"The loss falls most steeply at a learning rate of {steepest:.2g} and is smallest at {lowest:.2g} "
                f"(smoothed, {len(points)} updates of {len(rates)}); try --lr {steepest:.2g}. Curves: {out}/lr_find.png"
            )
