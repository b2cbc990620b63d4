"""Grey images and networks of one channel, in every command; other numbers of channels are refused."""

import logging

import mindcv
import numpy as np
import pytest
from commands import script
from mindspore import Tensor
from PIL import Image

from mindska import builders
from mindska.config import parse_args
from mindska.errors import ConfigError, WeightsError
from mindska.models.factory import own_preprocessing
from mindska.prediction import open_predictor
from mindska.weights import open_weights
from mindska.weights.files import write_checkpoint

MODEL = "skanet_nano"


@pytest.fixture
def weights_of(tmp_path):
    """Writes weights of a network with so many channels, with the record of one with three; returns their path."""

    def write(in_channels):
        net = mindcv.create_model(MODEL, num_classes=3, in_channels=in_channels)
        record = dict(model=MODEL, num_classes=3, preprocessing=own_preprocessing(MODEL))
        write_checkpoint(tmp_path / f"{in_channels}.ckpt", {p.name: p for p in net.get_parameters()}, record)
        return tmp_path / f"{in_channels}.ckpt"

    return write


def test_the_pixels_are_of_the_weights_channels(weights_of):
    pixels = open_weights(weights_of(1)).record["preprocessing"]
    assert pixels["mean"] == pytest.approx([np.mean([0.485, 0.456, 0.406])])
    assert pixels["std"] == pytest.approx([np.mean([0.229, 0.224, 0.225])])
    assert len(open_weights(weights_of(3)).record["preprocessing"]["mean"]) == 3


@pytest.mark.parametrize("in_channels", [4, 12])
def test_other_channels_are_refused(weights_of, in_channels):
    path = weights_of(in_channels)
    for read in (lambda: open_weights(path).record, lambda: open_predictor(path)):
        with pytest.raises(WeightsError, match=rf"{path}: images of {in_channels} channels are not handled: .* 1 .* 3"):
            read()


@pytest.mark.parametrize("found, wanted, said", [(3, 1, "summed"), (1, 3, "repeated and divided by 3")])
def test_weights_are_adapted_as_timm_does(weights_of, found, wanted, said, caplog):
    """What the network says of grey images stays."""
    caplog.set_level(logging.INFO, "mindska")
    config = parse_args(["--model", MODEL, "--ckpt_path", str(weights_of(found)), "--in_channels", str(wanted)])
    weights = builders.configured_weights(config)
    pixels = builders.build_preprocessing(config, weights.record["preprocessing"])
    assert pixels.in_channels == wanted
    adapted = builders.build_network(config, 3, wanted, weights).set_train(False)
    assert said in caplog.text and weights.in_channels == found
    grey = np.random.default_rng(0).standard_normal((1, 1, 64, 64), dtype=np.float32)
    inputs = {1: Tensor(grey), 3: Tensor(np.repeat(grey, 3, 1))}
    ours, theirs = adapted(inputs[wanted]).asnumpy(), weights.network()(inputs[found]).asnumpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_an_evaluated_network_keeps_its_channels(weights_of):
    config = parse_args(["--ckpt_path", str(weights_of(1)), "--in_channels", "3"])
    with pytest.raises(ConfigError, match="takes images of 1 channels, but in_channels is 3; leave it out"):
        builders.with_recorded_model(config, builders.configured_weights(config).record)


def test_means_of_other_channels(tmp_path):
    config = parse_args(["--model", MODEL, "--mean", "0.5", "--std", "0.2"])
    with pytest.raises(ConfigError, match="are of 1 channels, but images have 3; --in_channels 1 makes them"):
        builders.build_preprocessing(config)
    config = parse_args(["--model", MODEL, "--mean", "0.5", "--std", "0.2", "--in_channels", "1"])
    assert builders.build_preprocessing(config).in_channels == 1


@pytest.mark.slow
def test_grey_weights_are_exported_and_predict(weights_of, tmp_path, capsys):
    path = weights_of(1)
    Image.new("RGB", (70, 80), (200, 30, 90)).save(tmp_path / "a.png")
    script("export").main(["--ckpt_path", str(path), "--format", "onnx", "--to", str(tmp_path / "a.onnx")])
    printed = []
    for weights in (path, tmp_path / "a.onnx"):
        capsys.readouterr()
        script("predict").main([str(tmp_path / "a.png"), "--ckpt_path", str(weights), "--topk", "3"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count("%") == 3
