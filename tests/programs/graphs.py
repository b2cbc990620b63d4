"""Compiles a forward pass or a training step, what test_platforms.py reads: ``graphs.py forward|train MODEL``."""

import sys

import mindcv
import mindspore as ms
import numpy as np
from mindcv.loss import create_loss
from mindspore import Tensor

from mindska.config import Config
from mindska.training import StepOptions, TrainStep, build_optimizer, learning_rates

ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
# skanet_s compiles to the same primitives, forward (31) and in training (70), but takes a minute (compared by hand).
net = mindcv.create_model(sys.argv[2], num_classes=10)
images = Tensor(np.zeros((2, 3, 64, 64), np.float32))
if sys.argv[1] == "forward":
    net.set_train(False).compile(images)
else:
    config = Config(opt="adamw", weight_decay=0.05, epoch_size=2, warmup_epochs=1, cooldown_epochs=0)
    optimizer = build_optimizer(config, net, learning_rates(config, 2))
    options = StepOptions(clip_value=1.0, accumulation=2, ema_decay=0.9, dynamic_loss_scale=True)
    step = TrainStep(net, create_loss("CE", label_smoothing=0.1), optimizer, options).set_train(True)
    step.compile(images, Tensor([0, 1], ms.int32), Tensor(np.zeros((2, net.noise_size), np.float32)))
