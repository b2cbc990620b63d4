"""What MindSpore computes on some devices only: an early error elsewhere; and how it is put in."""

from types import SimpleNamespace

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.nn.layer import normalization
from test_optimizers import Blocks

from mindska import acceleration, builders
from mindska.config import Config, parse_args
from mindska.device_support import check_device
from mindska.distributed import World
from mindska.errors import ConfigError
from mindska.training import build_optimizer
from mindska.training.sync_bn import synchronise

CASES = [
    (["--opt", "lamb"], "opt is lamb, which MindSpore has for Ascend and GPU only, and this is CPU: take adamw"),
    (["--opt", "lars"], "opt is lars, which MindSpore has for Ascend only, and this is CPU: take momentum"),
    (["--sync_bn"], "sync_bn is true, but MindSpore synchronises batch norms on Ascend and GPU only, and this is CPU"),
]


@pytest.mark.fault("device")
@pytest.mark.parametrize("words, message", CASES)
def test_a_cpu_has_none_of_it(words, message, capsys):
    """Told before MindSpore is loaded where the device is named, else before the data is opened."""
    with pytest.raises(SystemExit):
        parse_args(["--device_target", "CPU", *words])
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match=message):
        builders.set_up(parse_args(words), World())


def test_other_devices_have_it():
    check_device(Config(opt="lars", sync_bn=True), "Ascend")
    check_device(Config(opt="lamb", sync_bn=True), "GPU")
    with pytest.raises(ConfigError, match="lars, which MindSpore has for Ascend only, and this is GPU"):
        check_device(Config(opt="lars"), "GPU")


@pytest.mark.parametrize("opt, operator", [("lamb", "Lamb"), ("lars", "LARSUpdate")])
def test_mindspore_has_no_kernel_for_them_on_cpu(opt, operator):
    """Where this fails, the error above is out of date. Our groups and tables fit MindSpore's optimisers."""
    net, rates = Blocks(), [0.1] * 3
    optimizer = build_optimizer(Config(opt=opt, layer_decay=0.5), net, rates)
    assert [p.name for p in optimizer.parameters] == [p.name for p in net.trainable_params()]
    with pytest.raises(RuntimeError, match=rf"Unsupported op \[{operator}\] on CPU"):
        optimizer(tuple(Tensor(np.ones(p.shape, np.float32)) for p in net.trainable_params()))


@pytest.mark.slow
def test_synchronised_batch_norms_keep_their_parameters(monkeypatch):
    """With two ranks as MindSpore would see them; in evaluation they compute what plain ones do."""
    net = mindcv.create_model("skanet_nano", num_classes=3).set_train(False)
    before, x = [(p.name, p.shape) for p in net.get_parameters()], Tensor(np.ones((1, 3, 64, 64), np.float32))
    expected = net(x).asnumpy()
    acceleration.decelerate(net)  # as on the devices that have it
    synchronise(net, 1)
    norms = [cell for _, cell in net.cells_and_names() if isinstance(cell, nn.BatchNorm2d)]
    assert len(norms) > 10
    gpu = SimpleNamespace(get_context=lambda name: "GPU", get_auto_parallel_context=lambda name: "stand_alone")
    monkeypatch.setattr(normalization, "context", gpu)
    monkeypatch.setattr(normalization, "get_rank", lambda: 0)
    monkeypatch.setattr(normalization, "get_group_size", lambda: 2)
    momenta = [cell.momentum for cell in norms]
    synchronise(net, 2)
    assert all(type(cell) is nn.SyncBatchNorm and cell.is_global for cell in norms)
    assert [cell.momentum for cell in norms] == momenta
    assert all(cell.bn_train.momentum == pytest.approx(cell.momentum) for cell in norms)
    assert {cell.bn_train.device_num for cell in norms} == {2}
    assert [(p.name, p.shape) for p in net.get_parameters()] == before and ms.get_context("mode") == ms.PYNATIVE_MODE
    np.testing.assert_allclose(net(x).asnumpy(), expected, atol=1e-5)
