"""What the parity tests assert and what `python tests/parity/report.py` prints: the measured differences themselves.

Differences are rms over the standard deviation of the authors' float64 values, unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mindcv
import mindspore as ms
import numpy as np
import torch
import training
from golden import golden, golden_input, golden_weights, rms
from mindspore import Tensor, nn
from training import Gradients

import mindska  # noqa: F401  registers the models
from mindska.config import Config
from mindska.models.layers.graph import MaxRelativeConv
from mindska.reference import skanet as torch_skanet
from mindska.weights import from_torch, load_into
from mindska.weights.convert import key_map

CASES = ("skanet_small_160", "skanet_small_256_b2", "skanet_small_ls005_160", "skanet_small_ls005_256_b2")
TRAIN_CASE = "train_skanet_small_ls005_160_b4"
MODEL = "skanet_s"


def reference(layer_scale_factor: float = 1.0, **overrides) -> torch_skanet.SkaNet:
    """The PyTorch reference with the goldens' weights, in eval mode."""
    net = torch_skanet.create(MODEL, **overrides)
    net.load_state_dict(golden_weights(MODEL, layer_scale_factor))
    return net.eval()


def port(layer_scale_factor: float = 1.0, **kwargs) -> nn.Cell:
    """The port with the goldens' weights, in eval mode."""
    net = mindcv.create_model(MODEL, **kwargs)
    load_into(net, from_torch(MODEL, golden_weights(MODEL, layer_scale_factor)))
    return net.set_train(False)


def port_taps(net: nn.Cell, x: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Intermediate maps (named as in the goldens) and neighbour indices of each block, in PyNative mode."""
    taps: dict[str, np.ndarray] = {}
    neighbours: dict[str, np.ndarray] = {}
    handles = []

    def keep(name):
        def hook(cell, inputs, output):
            taps[name] = output.asnumpy()

        return hook

    def keep_neighbours(name):
        def hook(cell, inputs, output):
            neighbours[name] = cell.neighbours(inputs[0]).asnumpy()

        return hook

    for i, stage in enumerate(net.stages, start=1):
        handles.append(stage.patch_embed.register_forward_hook(keep(f"stage{i}_embed")))
        handles.append(stage.blocks[-1].register_forward_hook(keep(f"stage{i}_block")))
        handles.append(stage.norm.register_forward_hook(keep(f"stage{i}_norm")))
        for j, block in enumerate(stage.blocks):
            graph = block.attn.spatial.graph
            assert isinstance(graph, MaxRelativeConv)
            handles.append(graph.register_forward_hook(keep_neighbours(f"block{i}.{j}")))
    ms.set_context(mode=ms.PYNATIVE_MODE)
    taps["logits"] = net(Tensor(x)).asnumpy()
    for handle in handles:
        handle.remove()
    return taps, neighbours


@cache
def reference_case(case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Taps and neighbours of the PyTorch reference."""
    net = reference(golden(case)[0]["layer_scale_factor"])
    with torch.no_grad():
        taps = {name: tap.numpy() for name, tap in net.taps(torch.from_numpy(golden_input(case))).items()}
    return taps, {name: graph.neighbours.numpy() for name, graph in net.graphs().items()}


@cache
def port_case(case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Taps and neighbours of the port."""
    return port_taps(port(golden(case)[0]["layer_scale_factor"]), golden_input(case))


@cache
def imposed_case(case: str) -> dict[str, float]:
    """Difference of the port from the reference when the reference is handed the port's neighbours."""
    taps, neighbours = port_case(case)
    net = reference(golden(case)[0]["layer_scale_factor"]).double()
    for name, graph in net.graphs().items():
        graph.imposed = torch.from_numpy(neighbours[name].astype(np.int64))
    with torch.no_grad():
        expected = net.taps(torch.from_numpy(golden_input(case)).double())
    return {name: rms(taps[name], tap.numpy()) for name, tap in expected.items()}


def different_neighbours(case: str) -> int:
    """Number of entries in which the port's neighbours and the reference's differ."""
    ours, theirs = port_case(case)[1], reference_case(case)[1]
    return sum(int((ours[name] != theirs[name]).sum()) for name in theirs)


@cache
def port_gradients() -> Gradients:
    """Of the golden's batch in training mode."""
    meta, _ = golden(TRAIN_CASE)
    net = port(meta["layer_scale_factor"], drop_rate=0.0, drop_path_rate=0.0)
    return training.gradients(net, golden_input(TRAIN_CASE), meta["labels"])


@cache
def reference_gradients() -> Gradients:
    """The same from the PyTorch reference in float32."""
    meta, _ = golden(TRAIN_CASE)
    net = reference(meta["layer_scale_factor"], drop_rate=0.0, drop_path_rate=0.0)
    return training.reference_gradients(net, golden_input(TRAIN_CASE), meta["labels"])


@cache
def sgd_losses() -> tuple[np.ndarray, np.ndarray]:
    """Losses of the golden's SGD steps, ours and theirs (float64), in the mode that is set."""
    meta, arrays = golden(TRAIN_CASE)
    net = port(meta["layer_scale_factor"], drop_rate=0.0, drop_path_rate=0.0)
    ours = training.sgd_losses(net, golden_input(TRAIN_CASE), meta["labels"], meta["sgd"]["lr"], steps=6)
    return ours, arrays["losses_f64"]


@dataclass
class AdamwRun:
    """Losses of ours and theirs, and the largest difference of each averaged parameter that is determined."""

    ours: list[float]
    theirs: list[float]
    average: dict[str, float]


@cache
def adamw_run(steps: int = 20, epochs: int = 10) -> AdamwRun:
    """Twenty steps by a recipe, ours against the same written with torch.optim.AdamW and timm's schedule."""
    batch, classes, decay, highest, lowest = 8, 7, 0.9, 2e-3, 1e-5
    config = Config(
        opt="adamw", lr=highest, weight_decay=0.05, warmup_epochs=3, warmup_lr=lowest, min_lr=lowest,
        epoch_size=epochs, cooldown_epochs=2, label_smoothing=0.1,
    )  # fmt: skip

    def rate(epoch: int) -> float:
        """timm's schedule: warm-up, a cosine counted from the start, cooldown."""
        if epoch < 3:
            return lowest + epoch * (highest - lowest) / 3
        if epoch < epochs - 2:
            return lowest + 0.5 * (highest - lowest) * (1 + np.cos(np.pi * epoch / (epochs - 2)))
        return lowest

    torch.manual_seed(0)
    reference = torch_skanet.create("skanet_nano", num_classes=classes, drop_path_rate=0.2, drop_rate=0.1).train()
    for key, p in reference.named_parameters():
        if "layer_scale" in key:
            torch.nn.init.constant_(p, 0.3)  # not their 1e-2: gradients must be well above rounding
        elif p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5 / p[0].numel() ** 0.5)
    net = mindcv.create_model("skanet_nano", num_classes=classes, drop_path_rate=0.2, drop_rate=0.1)
    load_into(net, from_torch("skanet_nano", reference.state_dict()))
    step = training.train_step(net, config, updates=steps, clip_value=1.0, ema_decay=decay)
    groups = [p for p in reference.parameters() if p.ndim > 1], [p for p in reference.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [dict(params=groups[0], weight_decay=0.05), dict(params=groups[1], weight_decay=0.0)],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    average = {key: value.clone() for key, value in reference.state_dict().items()}

    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, 3, 64, 64), dtype=np.float32)
    labels = rng.integers(0, classes, batch)
    run = AdamwRun([], [], {})
    for i in range(steps):
        noise = rng.random((batch, net.noise_size), dtype=np.float32)
        run.ours.append(float(step(Tensor(x), Tensor(labels, ms.int32), Tensor(noise))[0].asnumpy()))
        for group in optimizer.param_groups:
            group["lr"] = rate(i // (steps // epochs))
        optimizer.zero_grad()
        logits = reference(torch.from_numpy(x), torch.from_numpy(noise))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        run.theirs.append(loss.item())
        for key, value in reference.state_dict().items():
            average[key] = average[key] * decay + value * (1 - decay)

    # A bias that feeds a batch norm has no effect and a gradient of pure rounding, which Adam scales to whole steps;
    # the batch norm's mean follows it. Everything else is determined.
    free = ("patch_embed.proj.bias", "patch_embed.norm.moving_mean", "graph.conv.bias", "graph.norm.moving_mean")
    keys = key_map("skanet_nano")
    for parameter in step.ema:
        name = parameter.name[len("ema.") :]
        if not name.endswith(free):
            run.average[name] = float(np.abs(parameter.asnumpy() - average[keys[name]].numpy()).max())
    return run
