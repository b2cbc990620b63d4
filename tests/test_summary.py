"""The layers of a network: what is counted, and that the network is as before."""

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from tiny import Tiny

from mindska import acceleration, commands
from mindska.errors import SettingError
from mindska.summary import layers, table


def test_layers_of_a_small_network():
    rows = layers(Tiny(3, bn=True), 3, 16, 16)
    assert [tuple(row) for row in rows] == [
        ("conv", "Conv2d", (8, 4, 4), 8 * 48 + 8, 8 * 16 * 48, 0),
        ("norm", "BatchNorm2d", (8, 4, 4), 16, 0, 0),
        ("classifier", "Dense", (3,), 3 * 8 + 3, 3 * 8, 0),
    ]
    assert "| conv | Conv2d | 8x4x4 | 392 | 0.006 |" in table(rows)
    assert table(rows).endswith("| in all | 3 layers | | 435 | 0.006 |")


CONVOLUTIONS = [
    dict(kernel_size=3, pad_mode="same"),
    dict(kernel_size=(3, 5), stride=2, pad_mode="same"),
    dict(kernel_size=(3, 5), stride=(2, 1), pad_mode="valid"),
    dict(kernel_size=3, stride=2, pad_mode="pad", padding=1),
    dict(kernel_size=(5, 3), pad_mode="pad", padding=(4, 3, 1, 2), dilation=2),
    dict(kernel_size=3, pad_mode="pad", padding=1, group=2),
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_the_shape_of_a_convolution_is_the_one_that_it_computes(options):
    conv = nn.Conv2d(4, 6, **options)
    (row,) = layers(conv, 4, 19, 14)
    out = conv(Tensor(np.zeros((1, 4, 19, 14), np.float32)))
    assert (1, *row.shape) == out.shape
    assert row.macs == out.size * np.prod(conv.weight.shape[1:])


def test_the_network_is_as_before():
    net = mindcv.create_model("skanet_nano", num_classes=3).set_train(True)
    list(net.cells_and_names())[5][1].set_train(False)
    x = Tensor(np.random.default_rng(0).standard_normal((2, 3, 64, 64), dtype=np.float32))
    ms.set_context(mode=ms.GRAPH_MODE)

    def state():
        return [(name, type(cell), cell.training, sorted(vars(cell))) for name, cell in net.cells_and_names()]

    values, before = {p.name: p.asnumpy().copy() for p in net.get_parameters()}, state()
    rows = layers(net, 3, 64, 64)
    assert state() == before and ms.get_context("mode") == ms.GRAPH_MODE
    assert acceleration.is_accelerated(net) and not any(row.kind.startswith("Fused") for row in rows)
    for p in net.get_parameters():
        np.testing.assert_array_equal(p.asnumpy(), values[p.name])
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net.set_train(False)
    assert np.abs(net(x).asnumpy()).max() > 0, "the convolutions compute again"
    with pytest.raises(SettingError, match="smallest"):
        layers(net, 3, 16, 16)
    assert np.abs(net(x).asnumpy()).max() > 0


def test_the_command(capsys):
    commands.main(["count", "skanet_nano", "--layers"])
    printed = capsys.readouterr().out
    assert printed.startswith("skanet_nano, 3x64x64\n\n| layer | kind | output | parameters | M MACs |")
    assert "| stages.2.patch_embed.proj | Conv2d | 64x4x4 | 18,496 | 0.295 |" in printed
    assert "| stages.0.blocks.0.attn.spatial.graph | MaxRelativeConv | 16x16x16 | 0 |" in printed
    assert "| in all | " in printed and "| 419,140 | 5.680 |" in printed
