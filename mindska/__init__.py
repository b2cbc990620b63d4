"""Vision backbones for MindSpore; importing the package registers its models in MindCV's factory."""

import os

os.environ.setdefault("GLOG_v", "3")  # MindSpore's warnings are mostly about itself; errors stay

__version__ = "0.1.0"

from . import distributed

distributed.prepare()  # libraries read the environment when they load: before MindSpore does

# Registers the models. Afterwards: mindcv.create_model("skanet_s").
from . import models, weights

__all__ = ["distributed", "models", "weights"]
