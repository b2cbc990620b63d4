"""Prints sums of the outputs of some networks, the first compiled with the compile cache."""

import json
import sys

import mindcv
import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindska.compile_cache import compile_cached

name, size, options, others = json.loads(sys.argv[1])
ms.set_context(mode=ms.GRAPH_MODE)
ms.set_seed(1)
x = Tensor(np.random.default_rng(0).standard_normal((2, 3, size, size), dtype=np.float32))
sums = []
for other in [name, *others]:
    net = mindcv.create_model(other, num_classes=10).set_train(False)
    compile_cached(net, x, options=options)
    sums.append(float(np.abs(net(x).asnumpy()).sum()))
print(json.dumps(sums))
