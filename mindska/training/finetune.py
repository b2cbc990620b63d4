"""Parts of a network that are trained slower than the rest, or not at all."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Optional

from mindspore import Parameter, nn

from ..config import Config
from ..errors import ConfigError, few
from ..names import method_and_backbone
from ..weights.convert import classifier_prefixes

log = logging.getLogger("mindska")

BLOCK = re.compile(
    r"(?:backbone\.)?stages\.(\d+)\.(?:blocks\.)?(\d+)\."
)  # of SkaNet and VAN, of SKNet, of many of MindCV's networks
STAGE = re.compile(r"(?:backbone\.)?stages\.(\d+)\.")


def is_part(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a parameter or cell of this name is, or is a part of, one of those that `prefixes` name."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def parts(names: Iterable[str]) -> list[str]:
    """The parts of a network by the names of its parameters: "stem", "stages.0", "classifier"."""
    found = (re.match(r"[^.]+(\.\d+)?", name) for name in names)
    return list(dict.fromkeys(match[0] for match in found if match))


def head_prefixes(model: str, parameters: Iterable[str]) -> tuple[str, ...]:
    """How the names of the parameters begin that are no backbone's: the classifier's, or all that is built on a
    backbone."""
    if not method_and_backbone(model)[0]:
        return classifier_prefixes(model)
    return tuple(dict.fromkeys(f"{name.partition('.')[0]}." for name in parameters if not is_part(name, ["backbone"])))


def frozen_parts(config: Config, names: Sequence[str]) -> list[str]:
    """What the configuration says not to train; names: of the network's parameters.

    Raises:
        ConfigError: the network has no such part, or no other one.
    """
    head = head_prefixes(config.model, names)
    frozen = [prefix.rstrip(".") for prefix in config.freeze]
    for prefix in frozen:
        if not any(is_part(name, [prefix]) for name in names):
            known = parts(names)
            near = difflib.get_close_matches(prefix, [*known, *names], n=1)
            raise ConfigError(
                f"freeze names {prefix!r}, but {config.model} has no such part"
                + (f"; did you mean {near[0]!r}? " if near else ". ")
                + f"It has {few(known, 30)} (and parts of these, as {names[0].rpartition('.')[0]})"
            )
    if config.freeze_backbone:
        if not any(name.startswith(head) for name in names):
            raise ConfigError(
                f"freeze_backbone: which parameters of {config.model} are its classifier is not known (none begins "
                f"with {' or '.join(head)}); name what to freeze with --freeze: {few(parts(names), 30)}"
            )
        frozen += [part for part in parts(names) if not part.startswith(tuple(h.rstrip(".") for h in head))]
    if frozen and all(is_part(name, frozen) for name in names):
        raise ConfigError(f"freeze names every part of {config.model}: there is nothing left to train")
    return frozen


def freeze(config: Config, network: nn.Cell) -> list[Parameter]:
    """Freezes the parts of a network that the configuration names; returns their parameters, statistics included.

    The optimiser does not get them. Their batch norms stay in evaluation: `TrainStep` sees to it.

    Raises:
        ConfigError: the network has no such part, or no other one.
    """
    every = network.trainable_params()
    prefixes = frozen_parts(config, [p.name for p in every])
    if not prefixes:
        return []
    frozen = [p for p in network.get_parameters() if is_part(p.name, prefixes)]
    for parameter in frozen:
        parameter.requires_grad = False
    network.frozen_parts = tuple(prefixes)
    log.info(
        "Frozen: %s. %s of %s parameters are trained",
        few(prefixes, 30), *(f"{sum(p.size for p in some):,}" for some in (network.trainable_params(), every)),
    )  # fmt: skip
    return frozen


def frozen_norms(network: nn.Cell) -> list[nn.Cell]:
    """The batch norms within the frozen parts of a network."""
    prefixes = getattr(network, "frozen_parts", ())
    cells = network.cells_and_names() if prefixes else ()
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [cell for name, cell in cells if isinstance(cell, norms) and is_part(name, prefixes)]


def layer_numbers(names: Sequence[str], head: tuple[str, ...]) -> Optional[dict[str, int]]:
    """The layer of each parameter, for the layer-wise decay of the learning rate; None: the network has no stages.

    As timm counts ConvNeXt's, and BEiT (Bao et al., 2022) its own: 0 is what comes before the first block (the stem, or
    the first stage's patch embedding), then every block is a layer, and the last is what comes after them: the
    classifier. What lies between two stages belongs to the block after it, a stage's last norm to the block before it.

    Args:
        names: of the parameters.
        head: how the names of the classifier's begin, by one of these.
    """
    blocks = sorted({(int(m[1]), int(m[2])) for m in map(BLOCK.match, names) if m})
    if not blocks:
        return None
    numbers, last = {}, len(blocks) + 1
    for name in names:
        block, stage = BLOCK.match(name), STAGE.match(name)
        if block:
            numbers[name] = blocks.index((int(block[1]), int(block[2]))) + 1
        elif stage:
            own = [i for i, (number, _) in enumerate(blocks, start=1) if number == int(stage[1])]
            before = (own or [1])[0] if int(stage[1]) else 0
            numbers[name] = own[-1] if own and re.match(r"(?:backbone\.)?stages\.\d+\.norm\.", name) else before
        else:
            numbers[name] = last if name.startswith(head) or re.match(r"(head|norm|fc|classifier)\b", name) else 0
    return numbers


def learning_rate_factors(config: Config, network: nn.Cell) -> dict[str, float]:
    """By what the learning rate of each trained parameter is multiplied (name -> factor).

    With `layer_decay` that is layer_decay ** (number of layers above its own), see `layer_numbers`; with
    `backbone_lr_factor`, everything but the classifier has that factor as well.

    Raises:
        ConfigError: the network has no stages of blocks, or it is not known which is its classifier.
    """
    names = [p.name for p in network.trainable_params()]
    head, factors = head_prefixes(config.model, names), dict.fromkeys(names, 1.0)
    if config.layer_decay is not None:
        numbers = layer_numbers([p.name for p in network.get_parameters()], head)
        if numbers is None:
            raise ConfigError(
                f"layer_decay counts the blocks of a network (stages.0.blocks.0 or stages.0.0), and {config.model} has "
                f"none; leave it out (or --backbone_lr_factor for all but the classifier)"
            )
        top = max(numbers.values())
        factors = {name: config.layer_decay ** (top - numbers[name]) for name in names}
        log.info(
            "layer_decay: %d layers; the learning rate's factor is %.3g in the first and 1 in the last",
            top + 1,
            config.layer_decay**top,
        )
    if config.backbone_lr_factor != 1:
        if not any(name.startswith(head) for name in names):
            raise ConfigError(
                f"backbone_lr_factor: which trained parameters of {config.model} are its classifier is not known (none "
                f"begins with {' or '.join(head)}); leave it out"
            )
        factors = {n: f if n.startswith(head) else f * config.backbone_lr_factor for n, f in factors.items()}
    return factors
