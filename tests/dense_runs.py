"""Training runs of segmenters and detectors within this process, as train.py makes them."""

import mindspore as ms
import numpy as np
import pytest
from runs import Killed

from mindska import builders
from mindska.distributed import World
from mindska.modes import pynative_mode
from mindska.tasks import create_task
from mindska.training import Trainer, TrainStep, build_optimizer, learning_rates
from mindska.weights.files import read_file


def trainer(config):
    ms.set_seed(config.seed)
    task = create_task(config, World())
    weights = builders.configured_weights(config)
    task.open_data(validation=config.val_while_train)
    network = task.build_network(task.fit_weights(weights), weights.record if weights else {})
    evaluator, loader = task.evaluator(network), task.train_loader(network)
    rates = learning_rates(config, loader.steps_per_epoch)
    optimizer = build_optimizer(config, network, rates)
    step = TrainStep(network, task.loss(), optimizer, builders.build_step_options(config))
    made = (config, World(), step, loader, rates, evaluator, task.record(network), task.metric, task.measure)
    return Trainer(*made)


def fit(made, until=None, spoil=None):
    """Trains; dies after `until` steps. spoil: the step whose images are made NaN."""

    def watched(start, steps):
        for done, batch in enumerate(batches(start, steps), start):
            if done == until:
                raise Killed
            yield (np.full_like(batch[0], np.nan), *batch[1:]) if done == spoil else batch

    batches, made.loader.batches = made.loader.batches, watched
    with pynative_mode():
        if until is None:
            made.fit()
        else:
            with pytest.raises(Killed):
                made.fit()


def last(out, model):
    """Arrays of the newest checkpoint."""
    paths = sorted(out.glob(f"{model}-*_*.ckpt"), key=lambda path: int(path.stem.rpartition("_")[2]))
    return read_file(paths[-1])[0]
