"""Vision backbones for MindSpore: MindCV's factory has our models as soon as both packages are imported, in any order.

The import alone loads neither MindSpore nor MindCV, which takes seconds: commands check their settings before.
"""

import atexit
import importlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GLOG_v", "3")  # MindSpore's warnings are mostly about itself; errors stay

__version__ = "0.1.0"

from . import distributed, streams

if TYPE_CHECKING:
    from . import acceleration, detection, models, segmentation, weights
    from .detection.factory import create_detector
    from .segmentation.factory import create_segmenter

MODULES = ("acceleration", "detection", "distributed", "models", "segmentation", "weights")
CREATORS = {"create_detector": "detection", "create_segmenter": "segmentation"}  # function -> package
__all__ = [
    "acceleration", "create_detector", "create_segmenter", "detection", "distributed", "models", "segmentation",
    "weights",
]  # fmt: skip

streams.fill_standard_descriptors()
distributed.prepare()  # libraries read the environment when they load: before MindSpore does


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in CREATORS:
        return getattr(importlib.import_module(f"{__name__}.{CREATORS[name]}.factory"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _accelerate(network: Any) -> Any:
    from .acceleration import accelerate

    return accelerate(network)


@atexit.register
def _remove_destructor() -> None:
    # A network that lives to the end of a program would print an error for each of its cells: MindSpore's destructor
    # uses names that the interpreter has cleared by then. The package may be imported more than once.
    cell = getattr(sys.modules.get("mindspore.nn"), "Cell", None)
    if cell is not None and "__del__" in vars(cell):
        del cell.__del__


def _register_models() -> None:
    """Has `mindcv.create_model` know our models."""
    importlib.import_module("mindska.models")


def _complete_models() -> None:
    """Ties packages together that must not import each other, and registers what is built on the models."""
    from .models import factory

    factory.AFTER_CREATION[:] = [_accelerate]
    for package in CREATORS.values():  # which need the models whole
        importlib.import_module(f"mindska.{package}.published")


class _AfterImport(MetaPathFinder):
    """Calls a function once a module has been imported."""

    def __init__(self, module: str, function: Any) -> None:
        self.module, self.function = module, function

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.module:
            return None
        sys.meta_path.remove(self)  # once; and now the others look
        spec = importlib.util.find_spec(name)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                self.function()

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _AfterImport("mindska.models", _complete_models))
if "mindcv" in sys.modules:
    _register_models()
else:
    sys.meta_path.insert(0, _AfterImport("mindcv", _register_models))
