"""Trains a model by a recipe, on one device or many.

    mindska train --config skanet_nano_digits --data_dir DATA
    mpirun -n 8 --bind-to none mindska train --config skanet_s --data_dir DATA

`mindska recipes` lists the recipes. In a clone, train.py is the same command, for mpirun and msrun too:

    mpirun -n 8 --bind-to none python train.py --config configs/skanet_s.yaml --data_dir DATA
    msrun --worker_num=8 --local_worker_num=8 --join=True train.py --config configs/skanet_s.yaml --data_dir DATA
"""

from collections.abc import Sequence
from typing import Optional

from mindska.config import check_given, parse_args
from mindska.distributed import check_environment, distributed
from mindska.errors import clear_errors


def main(arguments: Optional[Sequence[str]] = None, description: Optional[str] = __doc__) -> None:
    config = parse_args(arguments, description or "", command="train")
    with clear_errors():
        check_given(config, "data_dir", "model")
        check_environment()

    # Only now, since they load MindSpore, which takes seconds.
    from mindska import builders
    from mindska.tasks import create_task
    from mindska.training import Trainer, TrainStep, build_optimizer, learning_rates, resumed_record

    with clear_errors(), distributed(builders.device_target(config)) as world, clear_errors():
        builders.set_up(config, world)
        task = create_task(config, world)

        # Data
        resumed = resumed_record(config)  # of the checkpoint from which this run resumes; {} when it begins
        weights = None if resumed else builders.configured_weights(config)
        record = resumed or (weights.record if weights else {})
        task.open_data(validation=config.val_while_train)

        # Model
        network = task.build_network(task.fit_weights(weights), record)
        evaluator = task.evaluator(network)

        # Training
        loader = task.train_loader(network)
        rates = learning_rates(config, loader.steps_per_epoch)
        optimizer = build_optimizer(config, network, rates)
        step = TrainStep(network, task.loss(), optimizer, builders.build_step_options(config), world.size)
        Trainer(config, world, step, loader, rates, evaluator, task.record(network), task.metric, task.measure).fit()
