import os
import signal

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
    # A command that ran in this process may have asked to end with its reader (errors.end_with_the_reader).
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


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
def scenes(tmp_path_factory):
    """Eight training and five validation scenes of digits, 48x48, for segmentation and detection."""
    from sklearn.datasets import load_digits

    from mindska.data.digit_scenes import split_scans, write_digit_scenes

    folder, digits = tmp_path_factory.mktemp("scenes") / "data", load_digits()
    scans = split_scans(digits.images, digits.target)
    write_digit_scenes(folder, scans, dict(train=8, val=5), size=(48, 48), digits=(1, 3))
    return folder


@pytest.fixture(scope="session")
def whole_run(images, tmp_path_factory):
    """An uninterrupted run of three epochs (12 steps)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    from commands import train

    return out, train(images, out)
