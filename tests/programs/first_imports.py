"""Imports each module of mindska as the first of a process that has its libraries loaded; prints those that fail.

    first_imports.py FOLDER    for compiled files

MindCV itself is imported anew each time, for our models are registered after it.
"""

import contextlib
import gc
import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(find_spec("mindska").submodule_search_locations[0])
LIBRARIES = ("mindspore", "mindcv", "onnxruntime", "onnx", "torch", "pycocotools.mask", "matplotlib.figure", "tqdm")


def modules() -> list[str]:
    """All modules and packages, but for __main__."""
    names = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))]
    return [".".join(parts).removesuffix(".__init__") for parts in names if parts[-1] != "__main__"]


def main(cache: str) -> None:
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    assert not any(name.partition(".")[0] == "mindska" for name in sys.modules)
    del sys.modules["mindcv"]
    gc.disable()  # a collection would copy the whole memory into each child
    sys.dont_write_bytecode, sys.pycache_prefix = False, cache  # compiled once, not in each child
    for name in modules():
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        os._exit(0)
    print(len(modules()), "modules")


if __name__ == "__main__":
    main(sys.argv[1])
