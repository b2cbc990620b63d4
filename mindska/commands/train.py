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
    from mindska import builders, data
    from mindska.training import Trainer, TrainStep, build_optimizer, learning_rates, resumed_record

    with clear_errors(), distributed(builders.device_target(config)) as world, clear_errors():
        builders.set_up(config, world)

        # Data
        resumed = resumed_record(config)  # of the checkpoint from which this run resumes; {} when it begins
        weights = None if resumed else builders.configured_weights(config)
        initial_record = resumed or (weights.record if weights else {})
        train_set, val_set = builders.open_training_data(config)
        builders.check_labels(train_set, training=True)
        num_classes = builders.training_classes(config, train_set.class_names)
        weights = builders.weights_for_classes(config, weights, train_set.class_names, num_classes)
        pixels = builders.build_preprocessing(config, initial_record.get("preprocessing"))
        share = builders.loader_share(config, world)

        # Model
        builders.check_batch(config, num_classes, pixels, initial_record)
        network = builders.build_network(config, num_classes, pixels.in_channels, weights, initial_record)
        builders.check_image_size(network, pixels)
        eval_network = val_set and builders.build_evaluation_network(config, num_classes, pixels.in_channels, network)

        # Batches
        loader = data.TrainLoader(
            train_set,
            data.TrainTransform(pixels, builders.build_augmentation(config)),
            config.batch_size,
            seed=config.seed,
            num_classes=num_classes,
            noise_size=getattr(network, "noise_size", 1),
            **builders.loading_options(config),
            **share,
        )
        val_loader = None
        if val_set is not None:
            val_loader = data.EvalLoader(
                val_set, data.EvalTransform(pixels), config.batch_size, skip_damaged=config.val_skip_damaged, **share
            )

        # Training
        rates = learning_rates(config, loader.steps_per_epoch)
        optimizer = build_optimizer(config, network, rates)
        loss = builders.build_loss(config, train_set, num_classes)
        step = TrainStep(network, loss, optimizer, builders.build_step_options(config), world.size)
        record = builders.checkpoint_record(config, network, train_set.class_names, pixels)
        Trainer(config, world, step, loader, rates, eval_network, val_loader, record).fit()
