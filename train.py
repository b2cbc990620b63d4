"""Trains a model by a recipe, on one device or many.

python train.py --config configs/skanet_nano_digits.yaml --data_dir DATA
mpirun -n 8 --bind-to none python train.py --config configs/skanet_s.yaml --data_dir DATA
msrun --worker_num=8 --local_worker_num=8 --join=True train.py --config configs/skanet_s.yaml --data_dir DATA
"""

from mindska import builders
from mindska.config import parse_args
from mindska.data import (
    EvalLoader,
    EvalTransform,
    TrainLoader,
    TrainTransform,
    check_same_classes,
    check_same_on_all_ranks,
    open_dataset,
)
from mindska.distributed import distributed
from mindska.errors import clear_errors
from mindska.training import Trainer, TrainStep, build_optimizer, earlier_record, learning_rates


def main() -> None:
    config = parse_args(description=__doc__)

    with clear_errors(), distributed(builders.device_target(config)) as world, clear_errors():
        builders.set_up(config, world)

        # Data
        earlier = earlier_record(config)  # of the checkpoint from which this run goes on, if it does
        weights = None if earlier else builders.configured_weights(config)
        began = earlier or (weights.record if weights else {})
        place, reading = (config.dataset, config.data_dir), builders.dataset_options(config)
        train_set = open_dataset(*place, config.train_split, **reading)
        val_set = open_dataset(*place, config.val_split, **reading) if config.val_while_train else None
        check_same_on_all_ranks(train_set)
        if val_set is not None:
            check_same_on_all_ranks(val_set)
            check_same_classes(train_set, val_set)
        builders.check_labels(train_set, training=True)
        num_classes = builders.training_classes(config, train_set.class_names)
        pixels = builders.build_preprocessing(config, began.get("preprocessing"))
        share = builders.loader_share(config, world)

        # Model
        builders.check_batch(config, num_classes, pixels, began)
        network = builders.build_network(config, num_classes, pixels.in_channels, weights, earlier)
        builders.check_image_size(network, pixels)
        eval_network = val_set and builders.build_evaluation_network(config, num_classes, pixels.in_channels, network)

        # Batches
        loader = TrainLoader(
            train_set,
            TrainTransform(pixels, builders.build_augmentation(config)),
            config.batch_size,
            seed=config.seed,
            num_classes=num_classes,
            noise_size=getattr(network, "noise_size", 1),
            **builders.loading_options(config),
            **share,
        )
        val_loader = val_set and EvalLoader(
            val_set, EvalTransform(pixels), config.batch_size, skip_damaged=config.val_skip_damaged, **share
        )

        # Training
        rates = learning_rates(config, loader.steps_per_epoch)
        optimizer = build_optimizer(config, network, rates)
        step = TrainStep(
            network, builders.build_loss(config), optimizer, builders.build_step_options(config), world.size
        )
        record = builders.checkpoint_record(config, network, train_set.class_names, pixels)
        Trainer(config, world, step, loader, rates, eval_network, val_loader, record).fit()


if __name__ == "__main__":
    main()
