"""VAN, LSKA, SKNet and the SK-ResNets compute the originals' functions: stages, logits, gradients, statistics, steps.

Differences are rms over the standard deviation of the originals' float64 figures. There is no neighbour search here:
float32 noise is 0.7e-6 to 1.4e-6 between the originals' own float32 and float64, and 5e-6 bounds everything.
"""

import families
import golden
import numpy as np
import pytest
from mindspore import Tensor, nn

NOISE = 5e-6


SLOW = ("lska_van_base_k7_224", "timm_skresnext50_32x4d_224")
CASES = [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in families.CASES]


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_one(case):
    """The PyTorch reference reproduces the originals' figures."""
    differences = golden.case_differences(families.reference_taps(case), case)
    assert max(differences.values()) < NOISE, differences


@pytest.mark.parametrize("case", CASES)
def test_stages_and_logits(case):
    differences = golden.case_differences(families.port_taps(case), case)
    assert len(differences) == len(golden.golden(case)[0]["stages"]) + 1
    assert max(differences.values()) < NOISE, differences


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lska_van_tiny_k23_224", "timm_skresnet18_224", "sknet50_224"])
def test_graph_mode_gives_the_same_logits(case, graph):
    logits = families.port(families.CASES[case])(Tensor(families.network_input(case))).asnumpy()
    assert golden.rms(logits, golden.golden(case)[1]["logits_f64"]) < NOISE


@pytest.mark.parametrize("model", families.TRAINED)
def test_gradients_of_every_parameter(model):
    relative, absolute = families.gradient_errors(model)
    assert len(relative) > len(absolute)
    assert max(relative.values()) < 1e-4, sorted(relative.items(), key=lambda item: -item[1])[:5]
    assert max(absolute.values(), default=0) < 1e-5
    ours, theirs = families.port_gradients(model), families.reference_gradients(model)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
    for name in relative:
        expected = theirs.gradients[name]
        assert np.linalg.norm(ours.gradients[name] - expected) < 1e-3 * np.linalg.norm(expected), name


@pytest.mark.parametrize("model", families.TRAINED)
def test_running_statistics(model):
    """After one step: variance is unbiased, and the share of the new value is PyTorch's or Caffe's."""
    assert families.statistics_error(model) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("model", families.TRAINED)
def test_five_sgd_steps(model, graph):
    ours, theirs = families.sgd_losses(model)
    assert theirs[-1] < theirs[0] - 0.01, "nothing learnt, nothing proven"
    np.testing.assert_allclose(ours[:2], theirs[:2], atol=1e-5)
    # Then a ReLU may open here and not there: PyTorch's own float32 parts from float64 by 2e-4.
    np.testing.assert_allclose(ours[2:], theirs[2:], atol=1e-3)


def test_exact_constants():
    for model, momentum in (("sknet50", 0.95), ("sk_resnet18", 0.9), ("van_tiny_lska_k23", 0.9)):
        for name, cell in families.port(model).cells_and_names():
            if isinstance(cell, nn.BatchNorm2d):
                # MindSpore keeps 1 - momentum: the share of the new value.
                assert (cell.eps, np.float32(cell.momentum)) == (1e-5, np.float32(1 - momentum)), name
            if isinstance(cell, nn.LayerNorm):
                assert cell.epsilon == 1e-6, name


@pytest.mark.parametrize(
    "original", ["lska_van_tiny_k23", "skresnet34", "skresnet50", pytest.param("sknet101", marks=pytest.mark.slow)]
)
def test_the_originals_keys_and_shapes(original):
    """`from_torch` and `from_caffe` take them all, and `to_torch` gives them back bit by bit."""
    model = {name: ours for ours, name in families.ORIGINALS.items()}[original]
    net = families.port(model)  # strict: every parameter filled, every weight used
    if model in families.CAFFE:
        first = golden.golden_weights(original)["conv1/7x7_s2.0"].numpy()
        np.testing.assert_array_equal(net.stem.conv.weight.asnumpy(), first[:, ::-1])
        return
    back = families.to_torch(model, {p.name: p.asnumpy() for p in net.get_parameters()})
    weights = golden.golden_weights(original)
    assert set(back) == {key for key in weights if not key.endswith("num_batches_tracked")}
    for key, value in back.items():
        np.testing.assert_array_equal(value, weights[key].numpy(), err_msg=key)


@pytest.mark.parametrize(
    "model, size",
    [
        ("van_tiny", (64, 64)),
        *(
            pytest.param(name, (64, 64), marks=pytest.mark.slow)
            for name in ("van_tiny_lska_k53", "sk_resnet34", "sk_resnet50")
        ),
        *((name, (97, 74)) for name in ("van_tiny_lska_k53", "sk_resnet34")),
        *(
            pytest.param(name, (97, 74), marks=pytest.mark.slow)
            for name in ("van_tiny", "sk_resnet50", "sknet101", "sknet29_16x32d")
        ),
    ],
    ids=str,
)
def test_models_without_figures_of_their_own_equal_the_reference(model, size):
    """The other size is odd and even: the pooling after the stem hangs over on one side only."""
    assert families.random_case(model, size) < NOISE


def test_mmsegmentations_backbone_is_the_same_network_with_another_epsilon():
    """Its features are the classifier's stages: the authors' segmentation code differs in names and epsilon only."""
    import torch

    classifier = golden.golden_weights("lska_van_tiny_k23")
    theirs = golden.authors_keys("lska_van_seg_tiny_k23")
    renamed = dict(zip(theirs, (value for key, value in classifier.items() if not key.startswith("head."))))
    assert all(value.numel() == np.prod(theirs[key]) for key, value in renamed.items())
    model = "van_tiny_lska_k23"
    net = families.mindcv.create_model(model, features_only=True, norm_eps=1e-5).set_train(False)
    families.load_into(net.net, families.from_torch(model, renamed))
    x = np.random.default_rng(2).standard_normal((1, 3, 64, 96), dtype=np.float32)
    reference = families.reference(model, norm_eps=1e-5).double()
    with torch.no_grad():
        taps = reference.taps(torch.from_numpy(x).double())
    for i, feature in enumerate(net(Tensor(x)), start=1):
        assert golden.rms(feature.asnumpy(), taps[f"stage{i}_norm"].numpy()) < NOISE


def test_caffes_pixels_and_ours_give_the_same_logits(tmp_path):
    """From a JPEG: Caffe's pipeline (BGR, means subtracted) into a network with the first convolution as published,
    and our preprocessing (RGB) into the converted one."""
    import torch
    from mindcv.models.registry import get_pretrained_cfg
    from PIL import Image

    from mindska.data import EvalTransform, Preprocessing

    rng = np.random.default_rng(0)
    path = tmp_path / "image.jpg"
    Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((400, 300)).save(path)
    card = get_pretrained_cfg("sknet50")
    pixels = Preprocessing((224, 224), card["crop_pct"], card["interpolation"], card["mean"], card["std"])
    ours = EvalTransform(pixels)(Image.open(path))[None]

    resized = Image.open(path).resize((341, 256), Image.Resampling.BILINEAR)
    top, left = round((256 - 224) / 2), round((341 - 224) / 2)
    rgb = np.asarray(resized, np.float64)[top : top + 224, left : left + 224]
    caffe = (rgb[..., ::-1] - (104, 117, 123)).transpose(2, 0, 1)[None]
    # float32 on values up to 152: half a unit in the last place is 8e-6, and the normalisation rounds three times.
    np.testing.assert_allclose(ours[:, ::-1], caffe, atol=5e-5)

    published = families.reference("sknet50").double()
    published.conv1.weight.data = published.conv1.weight.data.flip(1)
    with torch.no_grad():
        expected = published(torch.from_numpy(caffe)).numpy()
    assert golden.rms(families.port("sknet50")(Tensor(ours)).asnumpy(), expected) < NOISE
