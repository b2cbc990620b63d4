"""A recipe's network in evaluation, or its training step: ``recipe_step.py RECIPE forward|train|sink [--compile]``.

Network, loss, optimiser and precision are the recipe's. The training step has all that a step can have as well:
averaged weights, clipping, accumulation, loss scaling, and stochastic depth where the network has it. Runs on the
device that the environment variable DEVICE names (CPU); with --compile the graph is compiled and not run.
"""

import dataclasses
import os
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.dataset import GeneratorDataset

from mindska import builders
from mindska.benchmark.worker import CLASSES, Variant, finished, targets
from mindska.config import Config, read_yaml
from mindska.training import TrainStep, build_optimizer

BATCH, SIZE = 2, 64


def main(recipe: str, what: str, *options: str) -> None:
    settings = read_yaml(recipe)
    everything = dict(ema=True, clip_grad=True, gradient_accumulation_steps=2, batch_size=BATCH)
    everything.update(loss_scale_type="dynamic", loss_scale=1024.0)
    if settings.get("drop_path_rate") == 0:
        everything["drop_path_rate"] = 0.1
    config = dataclasses.replace(Config(**settings), **everything)
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(os.environ.get("DEVICE", "CPU"))
    network = builders.build_network(config, CLASSES.get(config.task, 10))
    rng = np.random.default_rng(0)
    images = rng.random((BATCH, 3, SIZE, SIZE), np.float32)
    if what == "forward":
        network.set_train(False)
        run(network, options, Tensor(images))
        return
    optimizer = build_optimizer(config, network, [1e-3] * 10)
    loss = builders.build_loss(config) if config.task == "classification" else None
    step = TrainStep(network, loss, optimizer, builders.build_step_options(config))
    step.set_train(True)
    noise = rng.random((BATCH, getattr(network, "noise_size", 1)), np.float32)
    batch = (images, *targets(Variant("mindska", config.model, "train", SIZE, BATCH, task=config.task)), noise)
    if what == "sink":
        data = GeneratorDataset([batch] * 4, [f"column{i}" for i in range(len(batch))], shuffle=False)
        advance = ms.data_sink(step, data)
        for _ in range(2):
            advance()[0].asnumpy()
        return
    run(step, options, *map(Tensor, batch))


def run(cell, options, *inputs) -> None:
    if "--compile" in options:
        cell.compile(*inputs)
        return
    for _ in range(2):  # of two steps the second updates
        finished([cell(*inputs)])


if __name__ == "__main__":
    main(*sys.argv[1:])
    print("launched")
