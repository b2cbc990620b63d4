"""What training tools put around weights and beside them: containers, prefixes, averages, an optimiser's state."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from ..errors import WeightsError, few

# Of published training checkpoints: where the weights lie, and where their average (EMA) over the training.
WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model_weights", "net_state_dict", "weights", "model", "module",
    "net", "network", "params",
)  # fmt: skip
AVERAGED = (
    "state_dict_ema",  # timm
    "model_ema",  # DeiT, ConvNeXt, torchvision's references
    "ema_state_dict",  # MMEngine; see `split`
    "model_ema_state_dict", "ema_model_state_dict", "state_dict_averaged", "averaged_state_dict",
    "ema_model", "ema", "ema_net", "net_ema", "params_ema", "averaged_model", "swa_state_dict", "swa_model",
)  # fmt: skip
INNER = (*WRAPPERS, "shadow")  # what may lie between such a name and the weights
DEEPEST = 5  # containers in one another

PREFIXES = (  # of names, before the network's own
    "module.",  # PyTorch's DataParallel and DistributedDataParallel
    "_forward_module.", "_module.",  # DeepSpeed and Lightning's Fabric; Opacus
    "model.", "net.", "network.",  # Lightning, and whoever keeps the network in a member of another one
    "_network.", "_backbone.",  # MindSpore's cells around a network
    "optimizer.",  # MindCV, when it accumulates gradients
    "van.",  # Hugging Face
)  # fmt: skip
# The same, where other networks may lie beside: the neck and heads of detectors and segmenters, other classifiers.
BACKBONES = ("backbone.", "encoder.")
# torch.compile, FSDP and activation checkpointing put theirs into the middle of names as well.
ANYWHERE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

ELSEWHERE = "MindCV writes the weights of a run into MODEL-EPOCH_STEP.ckpt, beside optim_MODEL.ckpt."
COUNTERS = {"num_batches_tracked", "n_averaged", "steps", "total_ops", "total_params"}  # no part of the function
# What MindSpore's and MindCV's trained checkpoints hold beside a network: numbers, by their names ...
TRAINING_NUMBERS = {
    "epoch_num", "step_num", "epoch", "step", "global_step", "learning_rate", "fake_lr", "momentum", "weight_decay",
    "beta1_power", "beta2_power", "mu_schedule", "loss_scale", "scale_sense", "current_iterator_step",
    "last_overflow_iterator_step", "updates", "accumulation_step", "accum_step", "graceful_init", "graceful_exit",
    "fake_param", "cov_step", "afactor_step",
}  # fmt: skip
# ... and of each weight NAME some arrays SLOT.NAME: momentums, gradients, copies.
TRAINING_SLOTS = {
    "moments", "moment", "moment1", "moment2", "moment3", "adam_m", "adam_v", "lamb_m", "lamb_v", "lion_m", "nadam_m",
    "nadam_v", "exp_avg", "exp_avg_sq", "vhat", "accum", "accum_update", "stat", "mean_square", "mean_grad", "linear",
    "prev", "prev_gradient", "step_size", "ax_", "accu_grads", "accumulated_grads", "grad_accumulation", "swap",
}  # fmt: skip
SLOT = re.compile(rf"(?:optimizer\.)?(?:(?:{'|'.join(sorted(TRAINING_SLOTS))})\.|mu_|eta_)(.+)")  # the last two: ASGD's
NUMBER = re.compile(
    rf"(?:optimizer\.)?(?:{'|'.join(sorted(TRAINING_NUMBERS))})(?:_group_\d+)?"
)  # of groups of parameters


def is_array(value: Any) -> bool:
    """Whether it is an array or a tensor; a hostile file may have anything under a known name, with any attributes."""
    plain = isinstance(value, (Mapping, argparse.Namespace))
    return isinstance(shape_of(value), tuple) and not plain


def shape_of(value: Any) -> Any:
    """What an object says of its shape; a nested tensor of PyTorch's has none, and raises."""
    try:
        return getattr(value, "shape", None)
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Named:
    """Weights by their names without the prefixes of training tools.

    Attributes:
        in_file: name -> its name in the file.
        beside: what lies beside a backbone, and is no part of it: a neck, heads.
        left_out: names in the file of what no network has: an optimiser's state, counters.
    """

    arrays: Mapping[str, Any]
    in_file: Mapping[str, str] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()
    left_out: Sequence[str] = ()

    def whole(self) -> Named:
        """The same for a network that has a backbone, whose names begin with "backbone." again."""
        names = {name: name if name in self.beside or not self.beside else f"backbone.{name}" for name in self.arrays}
        return Named(
            {names[name]: value for name, value in self.arrays.items()},
            {names[name]: key for name, key in self.in_file.items()},
            frozenset(),
            self.left_out,
        )


@dataclass(frozen=True)
class Choice:
    """The weights in a published checkpoint: those as trained, and their average (EMA), where it has either.

    Attributes:
        others: names under which there may be another average, of a kind that is not known.
    """

    raw: Optional[Named]
    averaged: Optional[Named]
    others: Sequence[str] = ()

    def take(self, ema: Optional[bool], what: str = "This checkpoint") -> tuple[Named, bool]:
        """The averaged weights where there are any, or, by `ema`, those (True) or the raw ones (False).

        Returns:
            The weights, and whether they are averaged.

        Raises:
            WeightsError: there are none of the kind that is asked for.
        """
        averaged = self.averaged is not None if ema is None else ema
        weights = self.averaged if averaged else self.raw
        if weights is not None:
            return weights, averaged
        if averaged:
            names, there = ", ".join(map(repr, AVERAGED[:3])), few(self.raw.arrays if self.raw else ())
            raise WeightsError(f"{what} has no averaged (EMA) weights: no {names} or the like; it has {there}")
        raise WeightsError(f"{what} has averaged weights (EMA) only; take them: --use_ema, in Python ema=True")

    @property
    def both(self) -> bool:
        """Whether there is a choice at all."""
        return self.raw is not None and self.averaged is not None


def split(checkpoint: Mapping) -> Choice:
    """Finds the raw and the averaged weights in a published checkpoint, by their names in it.

    Raises:
        WeightsError: two weights have the same name without prefixes, or there is an optimiser's state alone.
    """
    raw, averaged = _containers(checkpoint, set())
    own = _count(checkpoint)
    if (raw is None and averaged is None) or (own and own >= _count(averaged if raw is None else raw)):
        raw = {name: value for name, value in checkpoint.items() if name not in AVERAGED}  # no container, or a lesser
    if raw is not None and averaged is not None and "ema_state_dict" in checkpoint and "message_hub" in checkpoint:
        raw, averaged = averaged, raw  # MMEngine swaps the two when it saves, so that its tests take the average
    current = _weights_in(checkpoint.get("current_model_state"), set())
    if current is not None and averaged is None and "averaging_state" in checkpoint:
        raw, averaged = current, raw  # so does Lightning's WeightAveraging
    alone, inside, state = _beside(raw) if raw is not None else ({}, {}, ())
    alike = [name for name in checkpoint if re.search("ema|averag|swa|shadow", str(name), re.IGNORECASE)]
    known = (*AVERAGED, "averaging_state")
    others = [str(name) for name in alike if name not in known and _weights_in(checkpoint[name], set())]
    average = _named(*_without_state(averaged)) if averaged is not None else _named(inside, state) if inside else None
    return Choice(_named(alone, state) if alone or average is None else None, average, others)


def _count(weights: Optional[Mapping]) -> int:
    """The number of arrays, numbers apart."""
    return sum(is_array(value) and bool(value.shape) for value in (weights or {}).values())


def _containers(
    checkpoint: Mapping, barren: set[int], depth: int = DEEPEST
) -> tuple[Optional[Mapping], Optional[Mapping]]:
    """The raw weights in the first known container that has any, and the averaged ones.

    `barren`: what was searched in vain; a hostile file may have one container in thousands of places.
    """
    found = (_weights_in(checkpoint[name], barren) for name in AVERAGED if name in checkpoint)
    raw, averaged = None, next((weights for weights in found if weights is not None), None)
    for name in WRAPPERS if depth else ():
        value = checkpoint.get(name)
        if not isinstance(value, Mapping) or id(value) in barren:
            continue
        if any(is_array(entry) for entry in value.values()):
            raw = value
        else:
            raw, inner = _containers(value, barren, depth - 1)
            averaged = inner if averaged is None else averaged
            if raw is None and inner is None:
                barren.add(id(value))
        if raw is not None:
            break
    return raw, averaged


def _weights_in(value: Any, barren: set[int], depth: int = DEEPEST) -> Optional[Mapping]:
    """The weights in a container, or in those inside it that have known names."""
    if not isinstance(value, Mapping) or id(value) in barren:
        return None
    if any(is_array(entry) for entry in value.values()):
        return value
    for name in INNER if depth else ():
        weights = _weights_in(value.get(name), barren, depth - 1)
        if weights is not None:
            return weights
    barren.add(id(value))
    return None


def _stripped(name: str) -> tuple[str, bool, bool]:
    """A name without prefixes; whether one of them names an average; whether one of them names a backbone."""
    name, averaged, backbone = ANYWHERE.sub("", name), False, False
    while True:
        first, dot, rest = name.partition(".")
        prefix = first + dot
        if not dot or not (prefix in PREFIXES or prefix in BACKBONES or first in AVERAGED):
            return name, averaged, backbone
        name, averaged, backbone = rest, averaged or first in AVERAGED, backbone or prefix in BACKBONES


def _beside(weights: Mapping) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """The raw weights, the averaged ones that lie beside them under a prefix (MindCV: `ema.`), a training's state."""
    weights, state = _without_state(weights)
    if any(name.rpartition(".")[2] == "n_averaged" for name in weights):
        return {}, weights, state  # of PyTorch's AveragedModel
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, value in weights.items():
        parts[_stripped(name)[1]][name] = value
    return (*parts, state)


def _without_state(weights: Mapping) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The weights without what no network has, and the names of that."""
    weights = {str(name): value for name, value in weights.items()}
    state = _training_state(weights)
    if weights and len(state) == len(weights):
        raise WeightsError(f"It holds a training's or optimiser's state and no weights ({few(state, 3)}). {ELSEWHERE}")
    return {name: value for name, value in weights.items() if name not in state}, tuple(state)


def _named(weights: Mapping[str, Any], state: tuple[str, ...]) -> Named:
    arrays: dict[str, Any] = {}
    in_file, backbone = {}, set()
    for key, value in weights.items():
        name, _, inside = _stripped(key)
        if name in arrays:
            raise WeightsError(f"There are two weights called {name}, with and without the prefix of a training tool")
        arrays[name], in_file[name] = value, key
        if inside:
            backbone.add(name)
    return Named(arrays, in_file, frozenset(arrays.keys() - backbone if backbone else ()), state)


def _training_state(weights: Mapping[str, Any]) -> dict[str, None]:
    """The names of what no network has, in the file's order."""
    known = {name.removeprefix("optimizer.") for name in weights}
    slots = {name: match[1].removeprefix("optimizer.") for name in weights if (match := SLOT.fullmatch(name))}
    numbers = {name for name in weights if NUMBER.fullmatch(name)}
    alone = len(slots) + len(numbers) == len(weights)  # an optimiser's state in a file of its own
    mine = {name for name, weight in slots.items() if alone or weight in known}
    return {name: None for name in weights if name in mine or name in numbers}


def as_saved(named: Named) -> dict[str, Any]:
    """The weights under the file's names, for networks that are not ours: theirs may begin like a tool's prefix.

    Only what data-parallel training, torch.compile and MindCV's trainer put before them is left out.
    """
    prefixes = re.compile(r"^(module\.|_orig_mod\.|ema\.|optimizer\.)+")
    return {prefixes.sub("", named.in_file[name]): value for name, value in named.arrays.items()}
