import os

os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")

import mindspore as ms
import pytest

import mindska  # noqa: F401  registers the models


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Tests, and fixtures of any scope, interpret the network unless they ask for `graph`: compiling takes seconds."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_seed(0)


@pytest.fixture
def graph():
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Three classes of 12 small training and validation images."""
    from tiny import make_images

    folder = tmp_path_factory.mktemp("images")
    make_images(folder)
    return folder


@pytest.fixture(scope="session")
def whole_run(images, tmp_path_factory):
    """An uninterrupted run of three epochs (12 steps)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    from commands import train

    return out, train(images, out)
