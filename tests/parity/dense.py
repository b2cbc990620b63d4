"""Segmenters: the port with the dense goldens' weights, its taps, losses and gradients, and the PyTorch references."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
import torch
from dense_inputs import label_map
from golden import HERE, fill, image, rms
from mindspore import ParameterTuple, Tensor, nn, ops

from mindska import create_segmenter
from mindska.acceleration import decelerate
from mindska.models.layers.graph import MaxRelativeConv
from mindska.reference import create as create_reference
from mindska.reference.verify import reference_keys
from mindska.weights import from_torch, load_into
from mindska.weights.convert import key_map, recognise

# golden case -> our segmenter, and what else it is made with
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "semfpn_tiny_k23_128_b2": ("semantic_fpn_van_tiny_lska_k23", {}),
    "semfpn_small_k7_96x160": ("semantic_fpn_van_small_lska_k7", {}),
    "upernet_van_tiny_128": ("upernet_van_tiny", {}),
    "deeplabv3_skanet_os16_160_b2": ("deeplabv3_skanet_s", dict(output_stride=16)),
    "deeplabv3_skanet_os8_160": ("deeplabv3_skanet_s", dict(output_stride=8)),
}
TRAINED = "semfpn_tiny_k23_128_b2"


@cache
def golden(case: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Description and float64 arrays of a dense golden."""
    folder = HERE / "goldens_dense"
    with np.load(folder / f"{case}.npz") as arrays:
        return json.loads((folder / f"{case}.json").read_text()), dict(arrays)


def weights(case: str) -> dict[str, np.ndarray]:
    """The golden's weights under its keys."""
    meta, _ = golden(case)
    factor = np.float32(meta.get("layer_scale_factor", 1.0))
    return {key: fill(key, shape) * (factor if "layer_scale" in key else 1) for key, shape in meta["keys"]}


def batch(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, 3, H, W) and labels (B, H, W)."""
    meta, _ = golden(case)
    b, _, h, w = meta["input"]
    return image(meta["image_seed"], meta["input"]), label_map(meta["labels"]["seed"], (b, h, w), meta["classes"])


def port(case: str, accelerated: bool = True) -> nn.Cell:
    """The port with the golden's weights and without anything that is drawn, in evaluation."""
    name, options = CASES[case]
    net = create_segmenter(name, drop_path_rate=0.0, drop_rate=0.0, **options)
    load_into(net, from_torch(name, weights(case)))
    return (net if accelerated else decelerate(net)).set_train(False)


def keys(case: str) -> dict[str, str]:
    """Our parameter name -> the golden's key."""
    return key_map(CASES[case][0], recognise(CASES[case][0], weights(case), "torch"))


class Run(NamedTuple):
    """What a network gives for a golden's batch: taps by the golden's names, the losses' parts, SkaNet's neighbours."""

    taps: dict[str, np.ndarray]
    losses: list[float]
    loss: float
    neighbours: dict[str, np.ndarray]


@cache
def port_run(case: str, accelerated: bool) -> Run:
    """In PyNative mode, in evaluation."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net, (x, labels) = port(case, accelerated), batch(case)
    taps: dict[str, np.ndarray] = {}
    losses: list[float] = []
    neighbours: dict[str, np.ndarray] = {}

    def keep(cell: nn.Cell, *names: str) -> None:
        def hook(cell, inputs, output):
            values = output if isinstance(output, tuple) else (output,)
            taps.update(zip(names, (value.asnumpy() for value in values)))

        cell.register_forward_hook(hook)

    def keep_neighbours(cell: nn.Cell, name: str) -> None:
        def hook(cell, inputs, output):
            neighbours[name] = cell.neighbours(inputs[0]).asnumpy()

        cell.register_forward_hook(hook)

    def keep_branches(cell, inputs, output):
        taps.update((f"aspp{i}", branch.asnumpy()) for i, branch in enumerate(cell.branches(inputs[0][-1])))

    head = net.decode_head
    for i, stage in enumerate(net.backbone.stages, start=1):
        keep(stage.norm, f"stage{i}")
        for j, block in enumerate(stage.blocks):
            if isinstance(getattr(block.attn.spatial, "graph", None), MaxRelativeConv):
                keep_neighbours(block.attn.spatial.graph, f"block{i}.{j}")
    keep(head, "logits")
    net.criterion.register_forward_hook(lambda cell, inputs, output: losses.append(float(output.asnumpy())))
    if net.has_auxiliary:
        keep(net.auxiliary_head, "aux_logits")
    if net.method == "semantic_fpn":
        keep(net.neck, "neck0", "neck1", "neck2", "neck3")
        for i, layer in enumerate(head.scale_heads):
            keep(layer, f"scale_head{i}")
    elif net.method == "upernet":
        keep(head.bottleneck, "psp")
    else:
        head.register_forward_hook(keep_branches)
    loss = float(net.losses(Tensor(x), Tensor(labels)).asnumpy())
    taps["logits_up"] = net(Tensor(x)).asnumpy()
    return Run(taps, losses, loss, neighbours)


def differences(taps: dict[str, np.ndarray], case: str) -> dict[str, float]:
    """Of each tap from the golden's float64 values, rms over the golden's standard deviation."""
    _, arrays = golden(case)
    names = [key[: -len("/idx")] for key in arrays if key.endswith("/idx") and not key.startswith("train")]
    return {name: rms(taps[name].reshape(-1)[arrays[f"{name}/idx"]], arrays[f"{name}/val_f64"]) for name in names}


def reference(name: str, **options: Any) -> torch.nn.Module:
    """The PyTorch reference of a segmenter of ours."""
    return create_reference(name, **options)


def reference_like(net: nn.Cell, **options: Any) -> torch.nn.Module:
    """The reference with the weights of a network of ours, in float64 and evaluation."""
    result, names = reference(net.model_name, num_classes=net.num_classes, **options), reference_keys(net.model_name)
    state = {names[p.name]: torch.from_numpy(p.asnumpy()) for p in net.get_parameters()}
    loaded = result.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys and all(key.endswith("num_batches_tracked") for key in loaded.missing_keys)
    return result.double().eval()


@cache
def imposed_difference(case: str, accelerated: bool) -> float:
    """Of the logits from the reference's in float64 when it is handed the port's neighbours."""
    run = port_run(case, accelerated)
    net = reference_like(port(case), output_stride=CASES[case][1]["output_stride"])
    for name, graph in net.backbone.graphs().items():
        graph.imposed = torch.from_numpy(run.neighbours[name].astype(np.int64))
    with torch.no_grad():
        expected = net.head_logits(torch.from_numpy(batch(case)[0]).double())
    return rms(run.taps["logits"], expected.numpy())


class Step(nn.Cell):
    """A plain SGD step of a segmenter: loss and gradients before it."""

    def __init__(self, net: nn.Cell, lr: float) -> None:
        super().__init__(auto_prefix=False)
        self.net, self.lr = net, lr
        self.weights = ParameterTuple(net.trainable_params())
        self.gradient = ms.value_and_grad(self.loss, None, self.weights)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.net.losses(x, labels)

    def construct(self, x: Tensor, labels: Tensor) -> tuple:
        loss, gradients = self.gradient(x, labels)
        for weight, gradient in zip(self.weights, gradients):
            ops.assign(weight, weight - self.lr * gradient)
        return loss, gradients


class Trained(NamedTuple):
    """By the golden's keys: gradients of the first step, state after it; losses before and after."""

    losses: list[float]
    gradients: dict[str, np.ndarray]
    state: dict[str, np.ndarray]


def trained(case: str, accelerated: bool) -> Trained:
    """One SGD step in the mode that is set. Batch norm is in training only where the golden's is."""
    meta, (x, labels) = golden(case)[0], batch(case)
    net, names = port(case, accelerated), keys(case)
    net.set_train(True)
    if "train" not in meta:
        for _, cell in net.cells_and_names():
            if isinstance(cell, nn.BatchNorm2d):
                cell.set_train(False)
    step = Step(net, meta["train"]["lr"] if "train" in meta else 0.0)
    loss, gradients = step(Tensor(x), Tensor(labels))
    by_key = {names[p.name]: gradient.asnumpy() for p, gradient in zip(step.weights, gradients)}
    state = {names[p.name]: p.asnumpy().copy() for p in net.get_parameters()}  # the next step changes them in place
    losses = [float(loss.asnumpy())]
    if "train" in meta:
        losses.append(float(step(Tensor(x), Tensor(labels))[0].asnumpy()))
    return Trained(losses, by_key, state)


def gradient_errors(found: dict[str, np.ndarray], case: str) -> dict[str, float]:
    """Relative difference of each gradient's norm; of those that are zero in exact arithmetic, the norm itself over the
    largest of all."""
    meta, arrays = golden(case)
    norms, errors = dict(zip(meta["grad_norm_names"], arrays["grad_norm_f64"])), {}
    assert set(norms) == set(found)
    for name, expected in norms.items():
        norm = np.linalg.norm(found[name].astype(np.float64))
        zero = name in meta["grad_norm_tiny"]
        errors[name] = norm / max(norms.values()) if zero else abs(norm - expected) / expected
    return errors
