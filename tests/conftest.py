import os

os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")

import mindspore as ms
import pytest

import mindska  # noqa: F401  registers the models


@pytest.fixture(autouse=True)
def pynative():
    """Tests interpret the network unless they ask for `graph`: compiling takes seconds."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_seed(0)


@pytest.fixture
def graph():
    ms.set_context(mode=ms.GRAPH_MODE)
