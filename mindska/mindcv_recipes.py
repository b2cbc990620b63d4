"""MindCV's recipes: what its keys and values are called here, and which of them have no meaning here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from .errors import formatted_list

# MindCV's keys that are no settings of ours: the values by which they ask for what happens anyway, and what that is.
HAPPENS_ANYWAY: dict[str, tuple[tuple, str]] = {
    "shuffle": ((True,), "training images are always shuffled"),
    "eval_shuffle": ((False,), "validation images are not"),
    "drop_remainder": ((True,), "what is left of an epoch is dropped in training, never in evaluation"),
    "dataset_download": ((False,), "nothing is downloaded"),
    "num_samples": ((None,), "all images are used"),
    "aug_splits": ((None, 0), "images are not split"),
    "re_max_attempts": ((10,), "random erasing tries ten times"),
    "save_checkpoint": ((True,), "checkpoints are saved"),
    "ckpt_save_policy": (("top_k", "latest_k", None), "the newest two and the best are kept"),
    "resume_opt": ((False,), "the same command goes on with a run"),
    "layer_decay": ((None, 1, 1.0), "all layers have one learning rate"),
    "use_nesterov": ((False,), "momentum is the plain one"),
    "eps": ((1e-8,), "it is 1e-8"),
    "drop_overflow_update": ((True,), "an update that overflows is left out"),
    "amp_cast_list": ((None,), "amp_level says what is cast"),
    "val_amp_level": ((), "evaluation is in the precision of amp_level"),
    "multi_step_decay_milestones": ((), "for multi_step_decay"),
    "num_cycles": ((1,), "the cosine falls once"),
    "cycle_decay": ((1, 1.0), "the cosine falls once"),
    "aux_factor": ((0, 0.0), "the loss has one part"),
    "reduction": (("mean",), "the loss is a mean"),
    "enable_modelarts": ((False,), "it runs on the machine where it is started"),
    **dict.fromkeys(("data_url", "multi_data_url", "ckpt_url", "train_url"), ((), "for ModelArts")),
    **dict.fromkeys(
        ("pretrain_resize", "pretrain_interpolations", "mask_type", "mask_ratio", "mask_patch_size"),
        ((), "for training without labels"),
    ),
}
RENAMED = ("warmup_factor", "filter_bias_and_bn", "dynamic_loss_scale")
# Where they are left out, MindCV's command takes these. Pixels are not among them: here they come with the model.
DEFAULTS = dict(
    epoch_size=90, opt="adam", lr=1e-3, weight_decay=1e-6, warmup_epochs=3, decay_epochs=100, decay_rate=0.9,
    lr_epoch_stair=False, label_smoothing=0.0, clip_value=15.0, ema_decay=0.9999, re_value="const",
)  # fmt: skip
VALUES: dict[str, dict[Any, str]] = {
    "mode": {0: "graph", 1: "pynative"},
    "scheduler": {"warmup_cosine_decay": "cosine_decay"},
    "loss": {"ce": "CE", "bce": "BCE"},
    "weight_decay_filter": {"auto": "disable"},
    "re_value": {0: "const"},
}


def value(key: str, found: Any) -> Any:
    """A setting's value under the name that it has here."""
    known = VALUES.get(key, {})
    if isinstance(found, (int, str)) and not isinstance(found, bool):
        return known.get(int(found) if str(found).isdigit() else found, found)
    return found


def is_mindcvs(recipe: Mapping[str, Any], settings: Collection[str]) -> bool:
    """Whether a recipe is written for MindCV: it has a key that is no setting of ours."""
    return any(key not in settings and (key in HAPPENS_ANYWAY or key in RENAMED) for key in recipe)


def translated(recipe: Mapping[str, Any], settings: Collection[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """A recipe of MindCV in our settings.

    Args:
        settings: the names of ours; a key among them is not looked at.

    Returns:
        The settings; the keys that have no meaning here, one line each; and what else is to be said.
    """
    found = {key: value(key, each) for key, each in recipe.items() if each is not None or key not in DEFAULTS}
    left_out = {key: each for key, each in DEFAULTS.items() if key not in found}
    listed = ", ".join(f"{key} {str(each).lower()}" for key, each in left_out.items())
    said = [f"What it leaves out is as in MindCV: {listed}"] if listed else []
    found = {**left_out, **found}
    scheduler, without = found.get("scheduler", "cosine_decay"), []
    for key in [key for key in found if key not in settings and key in HAPPENS_ANYWAY]:
        each = found.pop(key)
        asks_nothing, why = HAPPENS_ANYWAY[key]
        if key == "val_amp_level":
            asks_nothing = (found.get("amp_level", "O0"),)
        if key == "multi_step_decay_milestones" and scheduler != "multi_step_decay":
            continue
        if not any(each == one and isinstance(each, bool) == isinstance(one, bool) for one in asks_nothing):
            without.append(f"{key}: {each} ({why})")
    if (factor := found.pop("warmup_factor", 0.0)) is not None and "warmup_lr" not in found:
        found["warmup_lr"] = float(factor) * float(found["lr"])
    filtered = found.pop("filter_bias_and_bn", None)
    if filtered is not None and "weight_decay_filter" not in found:
        found["weight_decay_filter"] = "norm_and_bias" if filtered else "disable"
    if (dynamic := found.pop("dynamic_loss_scale", None)) is not None:
        found.setdefault("loss_scale_type", "dynamic" if dynamic else "fixed")
    if found.get("loss_scale_type") == "auto":
        found["loss_scale_type"] = "fixed" if found.get("amp_level", "O0") == "O0" else "dynamic"
    if found.get("auto_augment") is None:
        found.setdefault("color_jitter", 0.4)
    elif found.pop("color_jitter", None) is not None:
        said.append("color_jitter has no effect beside auto_augment")
    for key in ("mean", "std"):
        numbers = found.get(key)
        if isinstance(numbers, list) and all(map(is_number, numbers)) and max(map(float, numbers), default=0) > 1:
            found[key] = [float(number) / 255 for number in numbers]  # MindCV's are on a scale of 0 to 255
    if scheduler == "cosine_decay" and "cooldown_epochs" not in found:
        whole, *parts = (int(float(found[key])) for key in ("epoch_size", "warmup_epochs", "decay_epochs"))
        rest = whole - sum(parts)
        if rest > 0:
            found["cooldown_epochs"] = rest
        elif rest < 0:
            said.append(f"the cosine reaches min_lr at the end, not {-rest} epochs after it")
    return found, without, said


def without_meaning(path: object, lines: list[str]) -> str:
    """The message on keys that have no meaning here."""
    return (
        f"{path} is a recipe of MindCV's with keys that have no meaning here; --ignore_unknown passes over them"
        + formatted_list("keys", lines, limit=50)
    )


def is_number(found: Any) -> bool:
    """Whether a value is a number, or the text of one as YAML reads `1e-3`."""
    try:
        return not isinstance(found, bool) and math.isfinite(float(found))
    except (TypeError, ValueError):
        return False
