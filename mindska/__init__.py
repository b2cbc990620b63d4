"""Vision backbones for MindSpore; importing the package registers its models in MindCV's factory."""

import atexit
import os

os.environ.setdefault("GLOG_v", "3")  # MindSpore's warnings are mostly about itself; errors stay

__version__ = "0.1.0"

from . import distributed

distributed.prepare()  # libraries read the environment when they load: before MindSpore does

from mindspore import nn


@atexit.register
def _without_destructor() -> None:
    # A network that lives to the end of a program would print an error for each of its cells: MindSpore's destructor
    # uses names that the interpreter has cleared by then. The package may be imported more than once.
    if "__del__" in vars(nn.Cell):
        del nn.Cell.__del__


# Registers the models. Afterwards: mindcv.create_model("skanet_s").
from . import acceleration, models, weights

models.factory.AFTER_CREATION[:] = [acceleration.accelerate]

__all__ = ["acceleration", "distributed", "models", "weights"]
