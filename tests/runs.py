"""Training runs within this process: three epochs of five batches of a tiny network."""

import mindspore as ms
import pytest
from tiny import Tiny

from mindska import builders
from mindska.config import Config
from mindska.data import (
    Augmentation,
    EvalLoader,
    EvalTransform,
    Preprocessing,
    TrainLoader,
    TrainTransform,
    open_dataset,
)
from mindska.distributed import World
from mindska.evaluation import ClassificationEvaluator
from mindska.training import Trainer, TrainStep, build_optimizer, learning_rates
from mindska.training.interrupt import EXIT_CODE


class Killed(Exception):
    """Stands for the end of a process."""


def trainer(images, out, validate=None, model="", **settings):
    """A trainer; `validate`: the split on which it evaluates; `model`: of the factory, made as train.py does."""
    ms.set_seed(0)
    settings = {"epoch_size": 3, "warmup_epochs": 1, "log_interval": 1, "batch_size": 7, **settings}
    config = Config(model=model or "tiny", ckpt_save_dir=str(out), val_while_train=validate is not None, **settings)
    pixels = Preprocessing((16, 16), 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    transform = TrainTransform(pixels, Augmentation())
    dataset = open_dataset("", images, "train")
    options = builders.loading_options(config)
    loader = TrainLoader(dataset, transform, config.batch_size, noise_size=8, num_classes=3, **options)
    rates = learning_rates(config, loader.steps_per_epoch)
    network = builders.build_network(config, 3) if model else Tiny(3)
    step = TrainStep(
        network,
        builders.build_loss(config, dataset, 3),
        build_optimizer(config, network, rates),
        builders.build_step_options(config),
    )
    evaluator = None
    if validate:
        evaluator = ClassificationEvaluator(
            builders.build_evaluation_network(config, 3, 3, network) if model else Tiny(3),
            EvalLoader(open_dataset("", images, validate), EvalTransform(pixels), 12),
        )
    return Trainer(config, World(), step, loader, rates, evaluator, {"model": config.model})


def fit(trainer, until=None, kill=None):
    """Trains; after `until` steps comes `kill`, by default an exception. Returns the steps of the checkpoints."""

    def die():
        raise Killed

    def watched(start, steps):
        for done, batch in enumerate(batches(start, steps), start):
            if done == until:
                (kill or die)()
            yield batch

    batches, trainer.loader.batches = trainer.loader.batches, watched
    if until is None:
        trainer.fit()
    else:
        with pytest.raises(SystemExit if kill else Killed, match=str(EXIT_CODE) if kill else None):
            trainer.fit()
    return [saved.step for saved in trainer.folder.saved()]
