"""Prints how long a forward pass and a training step of skanet_nano take: 8 images of 64 pixels, medians of five."""

import statistics
import time

import mindcv
import mindspore as ms
import numpy as np
from mindspore import nn

import mindska  # noqa: F401


def median(run) -> float:
    run()  # compiles
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


ms.set_context(mode=ms.GRAPH_MODE)
images = ms.Tensor(np.random.default_rng(0).random((8, 3, 64, 64), np.float32))
labels = ms.Tensor(np.arange(8, dtype=np.int32))
net = mindcv.create_model("skanet_nano", drop_path_rate=0.0)
forward = median(lambda: net.set_train(False)(images).asnumpy())
loss = nn.WithLossCell(net, nn.CrossEntropyLoss())
step = nn.TrainOneStepCell(loss, nn.SGD(net.trainable_params(), 0.0)).set_train()
print(f"{1000 * forward:.0f} ms, {1000 * median(lambda: step(images, labels).asnumpy()):.0f} ms")
