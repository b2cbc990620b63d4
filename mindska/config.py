"""Typed configuration: a YAML file, then the command line on top of it. An unknown key is an error.

The names are MindCV's where MindCV has one, timm's otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import math
import os
import reprlib
import struct
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from . import mindcv_recipes, names, recipes
from .arguments import Parser, nearest
from .device_support import check_device
from .errors import ConfigError
from .files import check_writable, exists

Numbers = tuple[float, ...]
Words = tuple[str, ...]
SCHEDULERS = ("cosine_decay", "step_decay", "multi_step_decay", "polynomial_decay", "one_cycle", "constant", "plateau")
DATASETS = dict(  # by task; the first is the default, but for segmentation, where the folders tell
    classification=("imagenet", "cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist"),
    segmentation=("ade20k", "voc", "folders"),
    detection=("coco",),
)
SIGNED = ("mean", "std")  # they have their own checks, with the pixels


def _option(default: Any, help: str, choices: Optional[Sequence] = None, heading: str = "", **rules: Any) -> Any:
    """A setting; in --help it stands under `heading`, as those after it do.

    `rules` may hold, for what is not so by default:

    - at_least, at_most, above, below: the range of the number, or of each of several. Numbers are at least 0, but for
      those with an `above` or `at_least` of their own.
    - share: of 1, so that numbers from 2 to 100 are refused as percentages.
    - hint: what to say to whoever is out of range, where other toolboxes have another unit.
    - may_change: a run may go on with another value.
    - path: it names a file or folder; `~` is the home folder.
    - metavar: what stands for a value in --help.
    - first_start: a run needs it when it begins and never again, so that later starts need not have the same.
    """
    known = {"at_least", "at_most", "above", "below", "share", "hint", "path", "may_change", "first_start", "metavar"}
    if unknown := set(rules) - known:
        raise TypeError(f"a setting has no {unknown}")
    return field(default=default, metadata={"help": help, "choices": choices, "heading": heading, **rules})


def _expected(rules: Mapping[str, Any]) -> str:
    """A setting's range in words."""
    low, high = rules.get("at_least"), rules.get("at_most")
    bottom, top = rules.get("above", low), rules.get("below", high)
    if (low, high) == (0, 1):
        return "a share between 0 and 1"
    if top is not None:
        return f"a number in {'(' if low is None else '['}{bottom:.9g}, {top:.9g}{')' if high is None else ']'}"
    if low is None:
        return f"a number above {bottom:g}" if bottom else "a positive number"
    return f"at least {low:g}" if low else "0 or more"


def _check_number(name: str, number: float, rules: Mapping[str, Any]) -> None:
    """ConfigError when a number is out of its setting's range, or of that of the numbers in which training computes."""
    if not math.isfinite(number):
        raise ConfigError(f"{name} is {number}; expected a finite number")
    whole = isinstance(number, int)
    smallest, largest = (1, 2**32 - 1) if whole else (2.0**-126, (2 - 2.0**-23) * 2.0**127)
    rules = {"at_least": 0, **rules} if "above" not in rules else rules
    if name in SIGNED:
        rules = {}
    share = rules.get("share") or 1 in (rules.get("at_most"), rules.get("below"))
    percent = f"{number:g} % is {number / 100:g}" if share and 2 <= number <= 100 else ""
    held = number if whole or abs(number) > largest else struct.unpack("f", struct.pack("f", number))[0]
    if not (
        rules.get("at_least", number) <= number <= rules.get("at_most", number)
        and rules.get("above", -math.inf) < held < rules.get("below", math.inf)  # 0.99999999 is 1 in float32
    ):
        hint = rules.get("hint") or percent
        raise ConfigError(f"{name} is {number}; expected {_expected(rules)}" + (f" ({hint})" if hint else ""))
    if percent:
        raise ConfigError(f"{name} is {number}; expected a share of 1 ({percent})")
    if number and not smallest <= abs(number) <= largest:
        zero = "" if "above" in rules or rules.get("at_least") else "0, or "
        kind = "32 bits" if whole else "float32"
        bounds = f"{zero}a number from {smallest:.5g} to {largest:.5g}"
        raise ConfigError(f"{name} is {number}; expected {bounds}: training computes in {kind}")


# Settings that have a meaning for some tasks only; others refuse them.
OF_TASKS = {
    ("classification",): (
        "class_map", "classes", "allow_outside_data_dir", "val_skip_damaged", "crop_pct", "scale", "ratio", "pad_crop",
        "vflip", "color_jitter", "auto_augment", "re_prob", "re_scale", "re_ratio", "re_value", "mixup", "cutmix",
        "cutmix_prob", "mixup_switch_prob", "aug_repeats", "mixup_off_epoch", "sampler", "loss", "label_smoothing",
        "class_weights", "mask_classes", "tta", "real_labels", "corruptions", "severities", "corruptions_dir",
        "corruptions_plot",
    ),
    ("segmentation",): (
        "reduce_zero_label", "output_stride", "ratio_range", "short_side", "longest_side", "cat_max_ratio", "rotate",
        "blur", "resize_library", "val_resize", "size_divisor", "slide_stride", "scales",
    ),
    ("detection",): (
        "multi_scale", "max_boxes", "iou_crop", "train_images", "val_images", "skip_missing", "score_threshold",
        "max_detections",
    ),
    ("segmentation", "detection"): ("img_scale", "photometric", "flip"),
    ("classification", "segmentation"): ("val_ratio", "val_seed"),
}  # fmt: skip
TASKS_OF = {name: tasks for tasks, settings in OF_TASKS.items() for name in settings}


@dataclass(frozen=True)
class Config:
    """Everything that a run can be told. `None` where a default depends on the model or the machine."""

    device_target: str = _option(
        "auto",
        "where to run; auto takes the best that this machine has",
        ("auto", "CPU", "GPU", "Ascend"),
        heading="machine",
        may_change=True,
    )
    mode: str = _option(
        "graph", "compile the network (graph) or interpret it (pynative)", ("graph", "pynative"), may_change=True
    )
    distribute: Optional[bool] = _option(
        None,
        "MindCV's switch; not needed: mpirun or msrun is noticed. An error when it says otherwise than the launcher",
        may_change=True,
    )
    seed: int = _option(42, "seed of initial values, data order, augmentation and stochastic layers", at_most=2**32 - 1)

    task: Optional[str] = _option(
        None, "what the model is trained for; default: what it is made for", names.TASKS, heading="model"
    )
    model: str = _option("", "name in MindCV's factory; validate: default, the one that the checkpoint names")
    num_classes: Optional[int] = _option(None, "classes; default: as many as the data has", at_least=1)
    in_channels: Optional[int] = _option(
        None, "channels of the images: 3 (RGB) or 1 (grey); default: those of the weights, else 3", choices=(1, 3)
    )
    pretrained: bool = _option(False, "start from published MindSpore weights, where there are any", first_start=True)
    ckpt_path: str = _option(
        "",
        "start from (train) or evaluate (validate) these weights: MindSpore, PyTorch, safetensors, Caffe",
        path=True,
        first_start=True,
    )
    use_ema: Optional[bool] = _option(
        None,
        "of ckpt_path: the averaged (EMA) weights, or (false) the raw ones; default: averaged where there are any",
        first_start=True,
    )
    drop_rate: Optional[float] = _option(None, "dropout before the classifier; default: the model's", share=True)
    drop_path_rate: Optional[float] = _option(
        None, "stochastic depth of the last block; default: the model's", share=True
    )
    freeze_backbone: bool = _option(False, "train the classifier only; batch norms before it stay in evaluation")
    freeze: Words = _option(
        (), "train nothing of these parts (e.g. stem stages.0); their batch norms stay in evaluation", metavar="NAME"
    )

    dataset: Optional[str] = _option(
        None,
        "how the data is laid out. Classification: imagenet (folders of images; default), or the files of CIFAR "
        "(its binary format) or MNIST (idx format). Segmentation: ade20k, voc, folders (images/ and masks/); default: "
        "found by the folders. Detection: coco (default)",
        tuple(name for names in DATASETS.values() for name in names),
        heading="data",
    )
    data_dir: str = _option(
        "", "folder that holds train/ and val/ (or CIFAR's or MNIST's files)", path=True, may_change=True
    )
    train_split: str = _option(
        "train",
        "training images: a subfolder of classes or of tar files, the beginning of tar files' names, or a list of "
        "files (CSV with columns path,label)",
    )
    val_split: str = _option("val", "validation images, as train_split", may_change=True)
    class_map: str = _option(
        "",
        "text file with the class folders' names, one a line, in the order of the outputs; default: as text is sorted; "
        "or CSV file with lines of FOLDER,CLASS",
        path=True,
        may_change=True,  # the file; the classes are compared
    )
    exif_orientation: bool = _option(
        False, "turn photos as their EXIF tag says; the original training and evaluation did not"
    )
    val_ratio: float = _option(
        0.0,
        "share of the training images, of each class, that is kept for validation in the place of val_split; 0: none",
        below=1,
    )
    val_seed: int = _option(0, "seed of the choice that val_ratio makes", at_most=2**32 - 1)
    classes: str = _option(
        "",
        "take these classes only: names with commas between them, or a file with one a line; validate: evaluate on the "
        "images of these, of all that the network knows",
        may_change=True,  # the words; the classes are compared
    )
    allow_outside_data_dir: bool = _option(
        False, "a list of images (CSV) may name files outside of data_dir", may_change=True
    )
    batch_size: int = _option(128, "images per device and step", at_least=1)
    num_parallel_workers: Optional[int] = _option(
        None,
        "data worker threads per process; default: its share of the cores, at least two",
        at_least=1,
        at_most=1024,
        may_change=True,
    )

    max_damaged: float = _option(
        0.01, "share of the training images that may be unreadable; others replace them", at_most=1, may_change=True
    )
    val_skip_damaged: bool = _option(
        False, "leave unreadable validation images out, and say so, instead of failing", may_change=True
    )

    image_resize: Optional[tuple[int, ...]] = _option(
        None,
        "network input size in pixels: one number, or height width",
        heading="pixels (defaults come with the model)",
        at_least=1,
        at_most=8192,
    )
    crop_pct: Optional[float] = _option(
        None, "share of the resized image that the evaluation's centre crop keeps", at_least=0.1, share=True
    )
    interpolation: Optional[str] = _option(None, "resize filter", ("bilinear", "bicubic", "nearest", "lanczos"))
    mean: Optional[Numbers] = _option(None, "mean of each channel, on a scale of 0 to 1")
    std: Optional[Numbers] = _option(None, "standard deviation of each channel, on a scale of 0 to 1")

    scale: Numbers = _option(
        (0.08, 1.0), "share of the area that a random crop takes, from to", heading="augmentation", above=0, at_most=1
    )
    ratio: Numbers = _option((0.75, 1.3333333333333333), "aspect ratio of a random crop, from to", above=0, at_most=100)
    pad_crop: int = _option(
        0, "pad by so many pixels and crop at the image's own size, instead of scale and ratio", at_most=8192
    )
    hflip: float = _option(0.5, "probability of a horizontal flip", at_most=1)
    vflip: float = _option(0.0, "probability of a vertical flip", at_most=1)
    color_jitter: Optional[Numbers] = _option(
        None,
        "strength of brightness, contrast, saturation; not with auto_augment",
        at_most=5,
        hint="0.4 varies a factor from 0.6 to 1.4",
    )
    auto_augment: Optional[str] = _option(None, "RandAugment and relatives, e.g. randaug-m9-mstd0.5-inc1")
    re_prob: float = _option(0.0, "probability of random erasing", at_most=1)
    re_scale: Numbers = _option((0.02, 0.33), "share of the area that is erased, from to", above=0, at_most=1)
    re_ratio: Numbers = _option((0.3, 3.3), "aspect ratio of what is erased, from to", above=0, at_most=100)
    re_value: str = _option(
        "random", "what erased pixels become: normal noise, or the mean colour", ("random", "const")
    )
    mixup: float = _option(0.0, "mixup's alpha; 0: off")
    cutmix: float = _option(0.0, "cutmix's alpha; 0: off")
    cutmix_prob: float = _option(1.0, "probability that a batch is mixed at all", at_most=1)
    mixup_switch_prob: float = _option(0.5, "probability of cutmix rather than mixup when both are on", at_most=1)
    aug_repeats: int = _option(0, "repeated augmentation: copies of each image in an epoch; 0: off", at_most=100)
    mixup_off_epoch: int = _option(0, "epochs after which mixup and cutmix are off; 0: never")
    sampler: str = _option(
        "random",
        "random: every image once an epoch; balanced: as many of each class, those of small classes several times",
        ("random", "balanced"),
    )

    reduce_zero_label: Optional[bool] = _option(
        None,
        "0 in a mask is no class, and 1 the first; default: of ADE20K only",
        heading="segmentation and detection",
    )
    multi_scale: tuple[int, ...] = _option(
        (),
        "training of detectors: shorter sides, one of which is drawn in the place of img_scale's",
        at_least=1,
        at_most=8192,
    )
    max_boxes: int = _option(
        100,
        "training of detectors: objects of an image; of more, so many are drawn each time",
        at_least=1,
        at_most=10_000,
    )
    iou_crop: bool = _option(
        True, "training of ssdlite: crop at random, to a part whose IoU with an object is at least a random threshold"
    )
    train_images: str = _option(
        "", "folder of the training images, as it is or below data_dir; default: as COCO's layout", may_change=True
    )
    val_images: str = _option("", "folder of the validation images, as train_images", may_change=True)
    skip_missing: bool = _option(
        False, "leave out images that an annotation file names and that are not there", may_change=True
    )
    score_threshold: Optional[float] = _option(
        None, "objects of no higher score are left out; default: the method's", at_most=1, may_change=True
    )
    max_detections: Optional[int] = _option(
        None, "detections of an image that count; default: 100", at_least=1, at_most=10_000, may_change=True
    )
    output_stride: Optional[int] = _option(
        None, "stride of the backbone's last map; default: the model's (8 of deeplabv3, else 32)", (8, 16, 32)
    )
    img_scale: Optional[tuple[int, ...]] = _option(
        None,
        "resize to at most this longer and shorter side, keeping the ratio; default: the checkpoint's, else 2048 512",
        at_least=1,
        at_most=8192,
    )
    ratio_range: Numbers = _option(
        (0.5, 2.0), "training: img_scale times a random factor, from to", above=0, at_most=100
    )
    short_side: Optional[tuple[int, ...]] = _option(
        None,
        "training, in the place of img_scale: the shorter side gets so many pixels, from to, the longer at most "
        "longest_side",
        at_least=1,
        at_most=8192,
    )
    longest_side: int = _option(1024, "see short_side", at_least=1, at_most=8192)
    cat_max_ratio: float = _option(
        0.75, "training: share of a crop that one class should stay below; 1: any crop will do", above=0, at_most=1
    )
    photometric: bool = _option(True, "training: random brightness, contrast, saturation, hue")
    rotate: float = _option(0.0, "training: random rotation by at most so many degrees", at_most=180)
    blur: float = _option(0.0, "training: probability of a Gaussian blur", at_most=1)
    resize_library: Optional[str] = _option(
        None,
        "whose pixels a resized image has: OpenCV's (MMSegmentation) or Pillow's (ml-cvnets); default: the "
        "checkpoint's, else opencv",
        ("opencv", "pillow"),
    )
    val_resize: Optional[str] = _option(
        None,
        "evaluation: resize to img_scale (keep_ratio), to image_resize (fixed; the ratio is lost), or not (none); "
        "default: the checkpoint's, else keep_ratio",
        ("keep_ratio", "fixed", "none"),
    )
    size_divisor: Optional[int] = _option(
        None,
        "evaluation: then resize to sides that this divides (VAN: 32); default: the checkpoint's, else 1",
        at_least=1,
        at_most=1024,
    )
    slide_stride: Optional[tuple[int, ...]] = _option(
        None,
        "evaluation: see images through a sliding window of image_resize, with this step (one number, or height "
        "width); default: whole",
        at_least=1,
        at_most=8192,
        may_change=True,
    )
    scales: Numbers = _option(
        (1.0,), "validate: mean over these scales of an image", above=0, at_most=100, may_change=True
    )
    flip: bool = _option(False, "validate: see mirror images as well", may_change=True)

    epoch_size: int = _option(300, "epochs in all, cooldown included", heading="optimisation", at_least=1)
    max_steps: int = _option(
        0, "updates in all; the schedule then counts in updates, and epoch_size has no effect; 0: epoch_size counts"
    )
    opt: str = _option("adamw", "optimiser", ("adamw", "adam", "sgd", "momentum", "lion", "rmsprop", "lamb", "lars"))
    lr: float = _option(1e-3, "highest learning rate", above=0)
    beta1: float = _option(0.9, "first decay of adamw, adam, lion and lamb", below=1)
    beta2: float = _option(0.999, "second decay of adamw, adam, lion and lamb", below=1)
    momentum: float = _option(0.9, "momentum of sgd, momentum, rmsprop and lars", below=1)
    use_nesterov: bool = _option(False, "Nesterov's momentum, with sgd and momentum")
    weight_decay: float = _option(0.05, "weight decay")
    weight_decay_filter: str = _option(
        "norm_and_bias",
        "norm_and_bias: none on biases and other 1-D parameters; norm: none on a backbone's norms (as MMSegmentation's "
        "recipes by name); disable: on all",
        ("norm_and_bias", "norm", "disable"),
    )
    scheduler: str = _option("cosine_decay", "learning-rate schedule", SCHEDULERS)
    min_lr: float = _option(
        1e-6, "lowest learning rate of cosine_decay, polynomial_decay and plateau, and of the cooldown"
    )
    warmup_epochs: int = _option(5, "epochs of linear warm-up")
    warmup_steps: int = _option(
        0,
        "updates of linear warm-up in the place of warmup_epochs: a factor that rises from warmup_lr / lr to 1 "
        "multiplies the schedule; 0: warmup_epochs counts",
    )
    warmup_lr: float = _option(1e-6, "learning rate at the start of the warm-up")
    cooldown_epochs: int = _option(0, "epochs at min_lr in the end")
    decay_epochs: int = _option(30, "epochs between two steps of step_decay", at_least=1)
    decay_rate: float = _option(0.1, "factor of step_decay and multi_step_decay", above=0, at_most=1)
    multi_step_decay_milestones: tuple[int, ...] = _option(
        (), "epochs after which multi_step_decay multiplies the learning rate with decay_rate", at_least=1
    )
    power: float = _option(1.0, "exponent of polynomial_decay; 1: a straight line", above=0, at_most=100)
    lr_epoch_stair: bool = _option(True, "the learning rate changes at epochs only (as in timm), not at every step")
    loss: str = _option("CE", "loss function", ("CE", "BCE"))
    label_smoothing: float = _option(0.1, "label smoothing", below=1)
    clip_grad: bool = _option(False, "clip the gradients' global norm", hint="its number is clip_value")
    clip_value: float = _option(5.0, "largest global norm, with clip_grad", at_least=1e-6)
    gradient_accumulation_steps: int = _option(1, "batches that make one update", at_least=1)
    ema: bool = _option(False, "average the weights, and evaluate the average")
    val_raw: bool = _option(
        True, "with ema: evaluate the raw weights too, so that the better ones are kept as best", may_change=True
    )
    ema_decay: float = _option(
        0.9998,
        "share of the old value that the average keeps at each update",
        at_least=0.5,
        at_most=0.99999,
        hint="the share of the old average that stays: MMPretrain's momentum 0.0002 is 0.9998",
    )
    layer_decay: Optional[float] = _option(
        None,
        "layer-wise decay: the learning rate of each block is this factor times that of the block after it",
        above=0,
        at_most=1,
    )
    backbone_lr_factor: float = _option(
        1.0,
        "factor of the learning rate of everything but the classifier",
        above=0,
        hint="to train nothing but the classifier: --freeze_backbone",
    )
    class_weights: Words = _option(
        (), "weight of each class in the loss: balanced (inverse to its images), or one number a class", metavar="X"
    )
    early_stopping: int = _option(0, "end after so many evaluations without a better top-1; 0: never", may_change=True)
    patience: int = _option(10, "plateau: evaluations without a better top-1 that the learning rate waits out")
    factor: float = _option(
        0.1, "plateau: what the learning rate is multiplied with after that", at_least=1e-6, below=1
    )
    sync_bn: bool = _option(False, "batch norms take the statistics of all processes' images (GPU and Ascend)")

    amp_level: str = _option(
        "O0", "mixed precision, as in mindspore.amp", ("O0", "O2", "O3", "auto"), heading="precision"
    )
    loss_scale_type: str = _option("fixed", "fixed or dynamic loss scale", ("fixed", "dynamic"))
    loss_scale: float = _option(1.0, "loss scale (initial, when dynamic)", at_least=2.0**-24, at_most=2.0**24)
    dataset_sink_mode: bool = _option(
        False, "feed batches through the device's queue (GPU and Ascend)", may_change=True
    )

    ckpt_save_dir: str = _option(
        "",
        "folder for checkpoints, metrics, curves; default: output/MODEL",
        heading="output",
        path=True,
        may_change=True,
    )
    resume: bool = _option(
        True, "go on from the newest good checkpoint in ckpt_save_dir; false: refuse to touch a run", may_change=True
    )
    extend: bool = _option(
        False,
        "with another epoch_size: go on although the schedule is another; from here on with that of the new length",
        may_change=True,
    )
    allow_other_environment: bool = _option(
        False,
        "go on although versions, operators or processor differ: the numbers may differ in their last digits",
        may_change=True,
    )
    keep_checkpoint_max: int = _option(3, "best checkpoints to keep (besides the newest two)", may_change=True)
    ckpt_save_interval: int = _option(1, "epochs between checkpoints", at_least=1, may_change=True)
    ckpt_save_steps: int = _option(0, "steps between further checkpoints within an epoch; 0: none", may_change=True)
    val_while_train: bool = _option(True, "evaluate during training", may_change=True)
    val_interval: int = _option(1, "epochs between evaluations", at_least=1, may_change=True)
    val_steps: int = _option(
        0, "steps between evaluations in the place of val_interval; 0: val_interval counts", may_change=True
    )
    log_interval: int = _option(50, "steps between rows of metrics.csv", at_least=1, may_change=True)
    max_skipped_steps: int = _option(
        50, "stop after so many updates in a row without a finite loss", at_least=1, may_change=True
    )
    result_json: str = _option("", "validate: write the results to this file", path=True, may_change=True)
    result_csv: str = _option(
        "", "validate: write a row of results for each checkpoint to this file", path=True, may_change=True
    )
    class_csv: str = _option(
        "", "validate: write a row of figures for each class to this file (CSV)", path=True, may_change=True
    )
    details: str = _option(
        "",
        "validate: write every image's path, label and most probable classes to this file (CSV); of segmentation, its "
        "path and figures",
        path=True,
        may_change=True,
    )
    mask_classes: bool = _option(
        True,
        "validate, with classes: choose among these only, as timm does for ImageNet-A and ImageNet-R; false: among all",
        may_change=True,
    )
    tta: Optional[str] = _option(
        None, "validate: flip takes the mean of the logits of an image and its mirror image", ("flip",), may_change=True
    )
    real_labels: str = _option(
        "",
        "validate: JSON file with the labels of each validation image in the order of their files' names (ReaL)",
        path=True,
        may_change=True,
    )
    more_ckpt_paths: tuple[str, ...] = _option(
        (), "validate: further checkpoints; --ckpt_path A B C sets them", may_change=True
    )
    corruptions: Words = _option(
        (),
        "validate: top-1 on corrupted images, and mean corruption errors: all (19), common (15), or names of "
        "ImageNet-C's corruptions",
        metavar="NAME",
        may_change=True,
    )
    severities: tuple[int, ...] = _option(
        (1, 2, 3, 4, 5), "validate, with corruptions: the severities", at_least=1, at_most=5, may_change=True
    )
    corruptions_dir: str = _option(
        "",
        "validate, with corruptions: folder in ImageNet-C's layout, CORRUPTION/SEVERITY/CLASS/IMAGE; default: they are "
        "made of the validation images",
        path=True,
        may_change=True,
    )
    corruptions_plot: str = _option(
        "", "validate, with corruptions: draw the error by severity into this file (PNG)", path=True, may_change=True
    )

    def __post_init__(self) -> None:
        known = bool(self.task or self.model or self.dataset)  # else a checkpoint will say which task it is
        if self.task is None:
            of_data = next((task for task, known in DATASETS.items() if self.dataset in known), "classification")
            object.__setattr__(self, "task", names.task_of(self.model) if self.model else of_data)
        if self.dataset is None and self.task != "segmentation":
            object.__setattr__(self, "dataset", DATASETS[self.task or ""][0])
        if known:
            self.check_task(self.task or "")
        if not self.ckpt_save_dir:
            object.__setattr__(self, "ckpt_save_dir", f"output/{self.model}" if self.model else "output")
        for entry in dataclasses.fields(self):
            choices, value = entry.metadata["choices"], getattr(self, entry.name)
            if entry.metadata.get("path"):
                object.__setattr__(self, entry.name, os.path.expanduser(value))  # noqa: PTH111 - see files.user_path
            if choices and value is not None and value not in choices:
                raise ConfigError(f"{entry.name} is {value!r}; expected one of {', '.join(map(str, choices))}")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, (int, float)) and not isinstance(number, bool):
                    _check_number(entry.name, number, entry.metadata)
        if self.max_steps or self.warmup_steps:  # they take the place of epochs
            object.__setattr__(self, "warmup_epochs", 0)
        if self.max_steps and self.cooldown_epochs:
            raise ConfigError("cooldown_epochs are of a run of epochs, but max_steps counts updates; leave one out")
        if not self.max_steps and self.warmup_epochs + self.cooldown_epochs >= self.epoch_size:
            raise ConfigError(
                f"epoch_size is {self.epoch_size}, but warm-up ({self.warmup_epochs}) and cooldown "
                f"({self.cooldown_epochs}) leave no epoch between them; raise epoch_size or lower them"
            )
        if self.beta2 < 0.5:
            raise ConfigError(
                f"beta2 is {self.beta2}; expected the share of the old value that stays: 0.999, not 0.001"
            )
        if (self.warmup_epochs or self.warmup_steps) and self.warmup_lr > self.lr:
            raise ConfigError(
                f"warmup_lr is {self.warmup_lr}, above lr ({self.lr}); expected a learning rate to rise from (no ratio)"
            )
        if self.scheduler in ("cosine_decay", "polynomial_decay", "plateau") and self.min_lr > self.lr:
            raise ConfigError(
                f"min_lr is {self.min_lr}, above lr ({self.lr}); expected a learning rate to fall to (no ratio)"
            )
        if self.image_resize is not None and len(self.image_resize) not in (1, 2):
            raise ConfigError(
                f"image_resize is {self.image_resize}; expected one size in pixels, or height and width"
                + (" (without the number of channels)" if len(self.image_resize) == 3 else "")
            )
        if self.val_ratio and self.val_split != Config.val_split:
            raise ConfigError(
                f"val_ratio is {self.val_ratio} and val_split is {self.val_split!r}; expected one of the two: "
                f"val_ratio takes the validation images from the training images"
            )
        if self.dataset and self.dataset not in DATASETS[self.task or ""]:
            raise ConfigError(
                f"dataset is {self.dataset!r}, but the task is {self.task}; expected one of "
                f"{', '.join(DATASETS[self.task or ''])}"
            )
        if self.model and self.task != names.task_of(self.model):
            raise ConfigError(
                f"task is {self.task}, but {self.model} is made for {names.task_of(self.model)}; leave task out"
            )
        names.chosen_corruptions(self.corruptions)
        if self.color_jitter is not None and self.auto_augment is not None:
            raise ConfigError("color_jitter and auto_augment exclude each other; set one of them to null")
        self._check_training()

    def check_task(self, task: str) -> None:
        """ConfigError when a setting was given that has no meaning for the task."""
        for name, tasks in TASKS_OF.items():
            if task not in tasks and getattr(self, name) != getattr(Config, name):
                raise ConfigError(f"{name} is a setting of {' and '.join(tasks)}, but the task is {task}; leave it out")

    def _check_training(self) -> None:
        """Checks settings that make sense together only."""
        if self.scheduler == "one_cycle" and (self.warmup_epochs or self.cooldown_epochs):
            raise ConfigError(
                f"one_cycle rises and falls by itself, but warmup_epochs is {self.warmup_epochs} and cooldown_epochs "
                f"{self.cooldown_epochs}; set both to 0"
            )
        if self.scheduler == "multi_step_decay" and not self.multi_step_decay_milestones:
            raise ConfigError("multi_step_decay needs multi_step_decay_milestones: the epochs after which it decays")
        if self.use_nesterov and (self.opt not in ("sgd", "momentum") or not self.momentum):
            raise ConfigError(
                f"use_nesterov is of sgd and momentum with a momentum above 0, but opt is {self.opt} and momentum "
                f"{self.momentum:g}; leave it out"
            )
        if self.class_weights and self.class_weights != ("balanced",):
            for word in self.class_weights:
                number = _convert("class_weights", word, float, "class_weights")
                _check_number("class_weights", number, {})
        if self.class_weights and self.loss != "CE":
            raise ConfigError(f"class_weights are of the loss CE, but loss is {self.loss}; try --sampler balanced")
        if self.class_weights == ("balanced",) and self.sampler == "balanced":
            raise ConfigError("class_weights balanced and sampler balanced do the same twice; choose one of them")
        if not self.iou_crop and self.model and not self.model.startswith("ssdlite_"):
            raise ConfigError(f"iou_crop is of ssdlite's training, but the model is {self.model}; leave it out")
        if self.early_stopping and not self.val_while_train:
            raise ConfigError("early_stopping needs evaluations, but val_while_train is false; leave one of them out")
        if self.scheduler == "plateau" and not self.val_while_train:
            raise ConfigError("plateau needs evaluations, but val_while_train is false; choose another scheduler")
        if self.device_target != "auto":  # else the device is known later
            check_device(self, self.device_target)


TYPES: dict[str, Any] = typing.get_type_hints(Config)
# What validation reads, and `validate --help` shows; a test compares it with what it does read.
VALIDATION = frozenset((
    "device_target", "mode", "distribute", "seed", "model", "num_classes", "in_channels", "ckpt_path", "use_ema",
    "dataset", "data_dir", "val_split", "class_map", "exif_orientation", "batch_size", "num_parallel_workers",
    "val_skip_damaged", "image_resize", "crop_pct", "interpolation", "mean", "std", "amp_level", "result_json",
    "train_split", "val_ratio", "val_seed", "classes", "allow_outside_data_dir", "result_csv", "details",
    "mask_classes", "tta", "real_labels", "more_ckpt_paths",
    "task", "class_csv", "reduce_zero_label", "output_stride", "img_scale", "resize_library", "val_resize",
    "size_divisor", "slide_stride", "scales", "flip", "val_images", "skip_missing", "score_threshold", "max_detections",
    "corruptions", "severities", "corruptions_dir", "corruptions_plot",
))  # fmt: skip


def _convert(name: str, value: Any, expected: Any, source: str) -> Any:
    """`value` as type `expected`; ConfigError when it is something else."""
    if typing.get_origin(expected) is Union:  # Optional[X]
        if value is None:
            return None
        expected = typing.get_args(expected)[0]
    if typing.get_origin(expected) is tuple:
        item = typing.get_args(expected)[0]
        values = value if isinstance(value, (list, tuple)) else [value]
        if item is str:  # YAML reads some words as numbers, and leaves others together
            values = [str(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for v in values]
            parts = [v.split(",") if isinstance(v, str) else [v] for v in values]
            values = [v.strip() if isinstance(v, str) else v for words in parts for v in words]
            values = [v for v in values if v != ""]
        return tuple(_convert(name, v, item, source) for v in values)
    if expected is float and isinstance(value, str):
        try:  # YAML reads 1e-3 (without a point) as a string
            return float(value)
        except ValueError:
            pass
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, expected) and not (expected in (int, float) and isinstance(value, bool)):
        return value
    hint = next((entry.metadata.get("hint") for entry in dataclasses.fields(Config) if entry.name == name), None)
    wanted = getattr(expected, "__name__", expected)
    raise ConfigError(f"{source}: {name} is {value!r}; expected {wanted}" + (f" ({hint})" if hint else ""))


notes: list[str] = []  # what is to be logged of the recipe that was read last, when there is a log


def read_yaml(path: Union[str, Path], ignore_unknown: bool = False) -> dict[str, Any]:
    """Settings of a recipe, given by its path or its name, checked; only plain YAML is read. It may be MindCV's.

    Args:
        ignore_unknown: pass over MindCV's keys that have no meaning here, instead of failing.
    """
    notes.clear()
    try:
        path = recipes.find(path)
        if path.stat().st_size > 1_000_000:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes; expected at most 1,000,000")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 10:
                raise ConfigError(f"{path} is not plain YAML: it is nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{path} is not plain YAML: it has aliases (*NAME), which may multiply without end")
        _refuse_twice(path, yaml.compose(text, yaml.SafeLoader))
        loaded = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter of text that is no UTF-8, or a date that is none
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not plain YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}; expected lines of `key: value`")
    if mindcv_recipes.is_mindcvs(loaded, TYPES):
        loaded = _read_mindcvs(path, loaded, ignore_unknown)
    if unknown := [key for key in loaded if key not in TYPES]:
        listed = ", ".join(f"{key!r}{nearest(str(key), TYPES)}" for key in unknown)
        raise ConfigError(f"{path}: unknown key{'s' if len(unknown) > 1 else ''} {listed}")
    loaded = {key: mindcv_recipes.value(key, value) for key, value in loaded.items()}
    return {key: _convert(key, value, TYPES[key], str(path)) for key, value in loaded.items()}


def _read_mindcvs(path: Path, recipe: dict[str, Any], ignore_unknown: bool) -> dict[str, Any]:
    """A recipe of MindCV in our settings, and what there is to say of it in `notes`."""
    for name in ("lr", "warmup_factor", "epoch_size", "warmup_epochs", "decay_epochs"):
        if recipe.get(name) is not None and not mindcv_recipes.is_number(recipe[name]):
            raise ConfigError(f"{path}: {name} is {recipe[name]!r}; expected a number")
    recipe, without, said = mindcv_recipes.translated(recipe, TYPES)
    if without and not ignore_unknown:
        raise ConfigError(mindcv_recipes.without_meaning(path, without))
    said += [f"Passed over (--ignore_unknown): {', '.join(without)}"] if without else []
    notes.extend(f"{path} is a recipe of MindCV's. {line}" for line in said)
    return recipe


def _refuse_twice(path: Path, root: Optional[yaml.Node]) -> None:
    """ConfigError where a key stands twice: YAML's reader takes the last one without a word."""
    lines: dict[str, int] = {}
    for key, _ in root.value if isinstance(root, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if str(key.value) in lines:
            raise ConfigError(
                f"{path} sets {key.value} twice, in lines {lines[key.value]} and {line}; keep one of them"
            )
        lines[str(key.value)] = line


def _parse_text(name: str, text: str) -> Any:
    """A command-line word as the type of option `name`."""
    try:
        # A path or a name stays what it is, even one that looks like a number; the rest is read as YAML reads it.
        value = mindcv_recipes.value(name, text if TYPES[name] is str else yaml.safe_load(text))
        return _convert(name, value, TYPES[name], "command line")
    except (ValueError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_args(arguments: Optional[Sequence[str]] = None, description: str = "", command: str = "") -> Config:
    """Configuration from `--config FILE` and one `--key value` for each setting; the command line wins.

    Several numbers are written with commas or spaces: `--image_resize 256,192`. A bare flag means true: `--ema`.
    Exits with status 2 and a message when something is wrong.

    Args:
        command: whose settings --help shows: "train" or "validate"; all are understood. Default: it shows all.
    """
    parser = Parser(usage="%(prog)s [--config RECIPE] [--key value ...]", description=description, allow_abbrev=False)
    parser.add_argument(
        "-c", "--config", metavar="RECIPE",
        help="name of a recipe (`mindska recipes` lists them) or YAML file; the options below go on top of it",
    )  # fmt: skip
    parser.add_argument(
        "--ignore_unknown", action="store_true", help="pass over keys of MindCV's recipes that have no meaning here"
    )
    add_argument = parser.add_argument
    for entry in dataclasses.fields(Config):
        if entry.metadata["heading"]:
            add_argument = parser.add_argument_group(entry.metadata["heading"]).add_argument
        choices = entry.metadata["choices"]
        text = entry.metadata["help"] + (f" ({', '.join(map(str, choices))})" if choices else "")
        text += f" [{entry.default}]" if entry.default not in (None, "", ()) else ""
        extra: dict[str, Any] = {}
        if TYPES[entry.name] in (bool, Optional[bool]):
            extra = dict(nargs="?", const="true", metavar="true|false")
        elif "tuple" in str(TYPES[entry.name]):
            extra = dict(nargs="+", metavar=entry.metadata.get("metavar", "N"))
        elif entry.name == "ckpt_path":
            extra = dict(nargs="+", metavar="FILE")
        shown = argparse.SUPPRESS if command == "validate" and entry.name not in VALIDATION else text.replace("%", "%%")
        add_argument(f"--{entry.name}", default=argparse.SUPPRESS, help=shown, **{"metavar": "X", **extra})
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(name, TYPES)}")
    namespace = vars(known)
    try:
        path, ignore_unknown = namespace.pop("config"), namespace.pop("ignore_unknown")
        settings = read_yaml(path, ignore_unknown) if path else {}
        if "ckpt_path" in namespace:
            first, *more = matching(namespace["ckpt_path"])
            namespace.update(ckpt_path=first, **({"more_ckpt_paths": more} if more else {}))
        for name, text in namespace.items():
            if name == "more_ckpt_paths":
                settings[name] = tuple(text)
                continue
            if isinstance(text, list):  # several numbers
                text = "null" if text == ["null"] else "[" + ",".join(text) + "]"
            settings[name] = _parse_text(name, text)
        return Config(**settings)
    except (ConfigError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))


def matching(paths: Sequence[str]) -> list[str]:
    """Paths as a shell reads them, for where none does: `~`, and patterns such as `run/*.ckpt`, whose files are sorted.

    What is there stays as it is, and so does a pattern that nothing matches.
    """
    found: list[str] = []
    for path in map(os.path.expanduser, paths):
        names = [] if exists(path) else sorted(glob.glob(path))  # noqa: PTH207 - as text
        found += names or [path]
    return found


def check_given(config: Config, *needed: str) -> None:
    """Checks what a command needs, before it loads MindSpore: settings that it cannot do without, and their paths.

    Raises:
        ConfigError: one of `needed` is empty, a file or folder is missing, or no model is called so.
    """
    what = dict(
        data_dir="data_dir is not set: name the folder that holds the images, e.g. --data_dir DATA",
        model="model is not set: name one, or take a recipe (`mindska recipes` lists them)",
        ckpt_path="the command needs --ckpt_path: the weights to evaluate",
    )
    if config.more_ckpt_paths and "model" in needed:
        raise ConfigError(
            f"ckpt_path names {1 + len(config.more_ckpt_paths)} files; a run starts from one (validate takes several)"
        )
    for name in dict.fromkeys((*needed, "data_dir")):
        value = getattr(config, name)
        if name == "data_dir" and not value and config.train_split.lower().endswith(".csv"):
            continue  # the paths are relative to the list
        if not value and name in needed and name in what:
            raise ConfigError(what[name])
        if value and name == "data_dir" and not exists(value):
            raise ConfigError(f"No data folder at {Path(value).absolute()}")
    if config.model:
        names.check_model(config.model)
        names.check_parts(config.model, config.freeze)
    if config.class_map and not exists(config.class_map):
        raise ConfigError(f"No class map at {Path(config.class_map).absolute()}")
    resumes = "ckpt_path" not in needed and any(Path(config.ckpt_save_dir).glob("*.ckpt"))  # it needs it no more
    for path in (config.ckpt_path, *config.more_ckpt_paths) if config.ckpt_path and not resumes else ():
        if not exists(path):
            raise ConfigError(f"No checkpoint at {Path(path).absolute()}")


def check_results(config: Config) -> None:
    """Whether what the command is to write can be written: before the work.

    Raises:
        ConfigError: a file that is of one checkpoint is asked for several.
        WriteError: one cannot be written.
    """
    of_several = ("result_csv", "corruptions_plot", *(("result_json",) if config.corruptions else ()))
    for name in ("result_json", "result_csv", "class_csv", "details", "corruptions_plot"):
        path = getattr(config, name)
        if path and config.more_ckpt_paths and name not in of_several:
            raise ConfigError(
                f"{name} is of one checkpoint, ckpt_path names {1 + len(config.more_ckpt_paths)}; --result_csv FILE "
                f"has a row for each"
            )
        if path:
            check_writable(Path(path))
    for name in ("class_csv", "details", "real_labels"):
        if config.corruptions and getattr(config, name):
            raise ConfigError(f"{name} is of images as they are; with corruptions, leave it out")
    if config.corruptions_plot and Path(config.corruptions_plot).suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(
            f"corruptions_plot is {config.corruptions_plot}; expected a name that ends in .png, .pdf or .svg"
        )
    if config.real_labels and not exists(config.real_labels):
        raise ConfigError(f"No file of labels at {Path(config.real_labels).absolute()}")


def settings_that(rule: str) -> set[str]:
    """The settings with a rule of `_option` that is either there or not: "may_change", "first_start"."""
    return {entry.name for entry in dataclasses.fields(Config) if entry.metadata.get(rule)}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings in which two configurations differ, one line each, `NAME: OLD -> NEW`."""
    keys = sorted(set(old) | set(new))
    return [_difference(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _difference(name: str, old: Any, new: Any) -> str:
    said = reprlib.Repr()
    said.maxstring = said.maxother = 150
    said.maxlist = 10
    place = ""
    if isinstance(old, list) and isinstance(new, list) and max(len(old), len(new)) > said.maxlist:
        first = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
        place = f" (of {len(old)} and {len(new)}, from number {first + 1} on)"
        old, new = old[first:], new[first:]
    return f"{name}: {said.repr(old)} -> {said.repr(new)}{place}"


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values (tuples become lists), for JSON and YAML."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
