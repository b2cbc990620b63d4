"""The check of an export knows that SkaNet is discontinuous, and finds a wrong export all the same."""

from pathlib import Path
from types import MethodType

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from test_folding import settled

from mindska import kernels, verification
from mindska.errors import ExportError
from mindska.exported import Exported
from mindska.models.layers.graph import NearestNodes

IMAGES = np.random.default_rng(0).standard_normal((8, 3, 64, 64), dtype=np.float32)
MODEL = Exported(Path("a.onnx"), b"as it was written", IMAGES.shape)


def searches(net):
    return [cell for _, cell in net.cells_and_names() if isinstance(cell, NearestNodes)]


class Coarse:
    """A network like another, as if exported to a library whose distances are off by up to `error`."""

    def __init__(self, net, error):
        self.net, self.indices, self.rng = settled("skanet_nano"), [], np.random.default_rng(1)
        self.factor, self.farther = 1.0, False
        ms.load_param_into_net(self.net, {p.name: p for p in net.get_parameters()})

        def construct(cell, queries, keys):
            closeness = cell.closeness(queries, keys)
            closeness += Tensor(self.rng.uniform(-error, error, closeness.shape).astype(np.float32))
            dilation = cell.fitting_dilation(keys)
            found = ops.topk(-closeness if self.farther else closeness, cell.k * dilation)[1]
            self.indices.append(found.asnumpy().astype(np.int64))
            return found[:, :, ::dilation]

        for cell in searches(self.net):
            cell.construct = MethodType(construct, cell)

    def runnable(self, model):
        def run(images):
            self.indices.clear()
            self.rng = np.random.default_rng(1)
            outputs = [self.factor * self.net(Tensor(images)).asnumpy()]
            return outputs + (self.indices if model is not MODEL else [])

        return run


@pytest.fixture(scope="module")
def made():
    with kernels.plain():
        net = settled("skanet_nano")
        return net, net(Tensor(IMAGES)).asnumpy(), Coarse(net, error=4e-5)


@pytest.fixture
def nets(made, monkeypatch):
    monkeypatch.setattr(verification, "with_neighbours", lambda model: Exported(model.path, b"", model.input_shape))
    net, _, coarse = made
    coarse.factor, coarse.farther = 1.0, False
    before = [cell.construct for cell in searches(net)]
    yield made
    assert [cell.construct for cell in searches(net)] == before and ms.get_context("mode") == ms.PYNATIVE_MODE


@pytest.mark.slow
@pytest.mark.fault("swapped-neighbours")
def test_a_swapped_neighbour_is_no_fault(nets):
    net, expected, coarse = nets
    difference = np.abs(coarse.runnable(MODEL)(IMAGES)[0] - expected).max() / np.abs(expected).max()
    assert difference > verification.TOLERANCE, "the case shows nothing"
    agreement = verification.compare(net, IMAGES, [expected], MODEL, coarse.runnable)
    assert agreement.difference < 1e-5 and 0 < agreement.swapped < 0.01 * agreement.neighbours
    assert "others, as near to rounding" in str(agreement)


@pytest.mark.fault("swapped-neighbours")
@pytest.mark.parametrize(
    "wrong",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("outputs", "one image", "not finite", "neighbours")),
        "shapes",
    ],
)  # fmt: skip
def test_what_is_wrong_is_found_among_swaps(nets, wrong):
    net, expected, coarse = nets
    message = "outputs differ from the network's by"
    if wrong == "neighbours":
        coarse.farther, message = True, "neighbours that are farther than the nearest"
    elif wrong == "shapes":
        coarse.factor, message = np.ones((1, 8, 1)), "gives outputs of the shapes"
    else:
        coarse.factor = np.ones((8, 1), np.float32)
        coarse.factor[-1 if wrong == "one image" else slice(None)] = np.nan if wrong == "not finite" else 1.001
    with pytest.raises(ExportError, match=message):
        verification.compare(net, IMAGES, [expected], MODEL, coarse.runnable)


def test_a_network_without_neighbours_must_agree():
    net = mindcv.create_model("van_tiny_lska_k7", num_classes=3).set_train(False)
    expected = np.ones((8, 3), np.float32)
    with pytest.raises(ExportError, match="differ from the network's by 1.0e-03 of the largest .bound 1e-04."):
        verification.compare(net, IMAGES, [expected], MODEL, lambda model: lambda images: [1.001 * expected])
