"""All settings. The names are MindCV's where MindCV has one, timm's otherwise."""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass
from typing import Any, Optional, Union

from .. import names
from ..device_support import check_device
from ..errors import ConfigError
from .rules import check_number, option

Numbers = tuple[float, ...]
Words = tuple[str, ...]
SCHEDULERS = ("cosine_decay", "step_decay", "multi_step_decay", "polynomial_decay", "one_cycle", "constant", "plateau")
DATASETS = dict(  # by task; the first is the default, but for segmentation, where the folders tell
    classification=("imagenet", "cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist"),
    segmentation=("ade20k", "voc", "folders"),
    detection=("coco",),
)

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
        "reduce_zero_label", "output_stride", "head_channels", "ratio_range", "short_side", "longest_side",
        "cat_max_ratio", "rotate", "blur", "resize_library", "val_resize", "size_divisor", "slide_stride", "scales",
    ),
    ("detection",): (
        "multi_scale", "max_boxes", "iou_crop", "train_images", "val_images", "skip_missing", "score_threshold",
        "max_detections",
    ),
    ("segmentation", "detection"): ("img_scale", "photometric", "flip"),
    ("classification", "segmentation"): ("val_ratio", "val_seed"),
}  # fmt: skip
TASKS_OF = {name: tasks for tasks, settings in OF_TASKS.items() for name in settings}
# Of detectors: settings of SSDLite, whose images have one size, and of those that keep an image's ratio of sides.
OF_SSDLITE, OF_OTHER_DETECTORS = ("image_resize", "iou_crop", "photometric"), ("img_scale", "multi_scale")
SIZES = ("image_resize", "img_scale", "multi_scale")


@dataclass(frozen=True)
class Config:
    """Everything that a run can be told. `None` where a default depends on the model or the machine."""

    device_target: str = option(
        "auto",
        "where to run; auto takes the best that this machine has",
        ("auto", "CPU", "GPU", "Ascend"),
        heading="machine",
        may_change=True,
    )
    mode: str = option(
        "graph", "compile the network (graph) or interpret it (pynative)", ("graph", "pynative"), may_change=True
    )
    distribute: Optional[bool] = option(
        None,
        "MindCV's switch; not needed: mpirun or msrun is noticed. An error when it says otherwise than the launcher",
        may_change=True,
    )
    seed: int = option(42, "seed of initial values, data order, augmentation and stochastic layers", at_most=2**32 - 1)

    task: Optional[str] = option(
        None, "what the model is trained for; default: what it is made for", names.TASKS, heading="model"
    )
    model: str = option("", "name in MindCV's factory; validate: default, the one that the checkpoint names")
    num_classes: Optional[int] = option(None, "classes; default: as many as the data has", at_least=1)
    in_channels: Optional[int] = option(
        None, "channels of the images: 3 (RGB) or 1 (grey); default: those of the weights, else 3", choices=(1, 3)
    )
    pretrained: bool = option(False, "start from published MindSpore weights, where there are any", first_start=True)
    ckpt_path: str = option(
        "",
        "start from (train) or evaluate (validate) these weights: MindSpore, PyTorch, safetensors, Caffe",
        path=True,
        first_start=True,
    )
    use_ema: Optional[bool] = option(
        None,
        "of ckpt_path: the averaged (EMA) weights, or (false) the raw ones; default: averaged where there are any",
        first_start=True,
    )
    drop_rate: Optional[float] = option(None, "dropout before the classifier; default: the model's", share=True)
    drop_path_rate: Optional[float] = option(
        None, "stochastic depth of the last block; default: the model's", share=True
    )
    freeze_backbone: bool = option(False, "train the classifier only; batch norms before it stay in evaluation")
    freeze: Words = option(
        (), "train nothing of these parts (e.g. stem stages.0); their batch norms stay in evaluation", metavar="NAME"
    )

    dataset: Optional[str] = option(
        None,
        "how the data is laid out. Classification: imagenet (folders of images; default), or the files of CIFAR "
        "(its binary format) or MNIST (idx format). Segmentation: ade20k, voc, folders (images/ and masks/); default: "
        "found by the folders. Detection: coco (default)",
        tuple(name for names in DATASETS.values() for name in names),
        heading="data",
    )
    data_dir: str = option(
        "", "folder that holds train/ and val/ (or CIFAR's or MNIST's files)", path=True, may_change=True
    )
    train_split: str = option(
        "train",
        "training images: a subfolder of classes or of tar files, the beginning of tar files' names, or a list of "
        "files (CSV with columns path,label)",
    )
    val_split: str = option("val", "validation images, as train_split", may_change=True)
    class_map: str = option(
        "",
        "text file with the class folders' names, one a line, in the order of the outputs; default: as text is sorted; "
        "or CSV file with lines of FOLDER,CLASS",
        path=True,
        may_change=True,  # the file; the classes are compared
    )
    exif_orientation: bool = option(
        False, "turn photos as their EXIF tag says; the original training and evaluation did not"
    )
    val_ratio: float = option(
        0.0,
        "share of the training images, of each class, that is kept for validation in the place of val_split; 0: none",
        below=1,
    )
    val_seed: int = option(0, "seed of the choice that val_ratio makes", at_most=2**32 - 1)
    classes: str = option(
        "",
        "take these classes only: names with commas between them, or a file with one a line; validate: evaluate on the "
        "images of these, of all that the network knows",
        may_change=True,  # the words; the classes are compared
    )
    allow_outside_data_dir: bool = option(
        False, "a list of images (CSV) may name files outside of data_dir", may_change=True
    )
    batch_size: int = option(128, "images per device and step", at_least=1)
    num_parallel_workers: Optional[int] = option(
        None,
        "data worker threads per process; default: its share of the cores, at least two",
        at_least=1,
        at_most=1024,
        may_change=True,
    )

    max_damaged: float = option(
        0.01, "share of the training images that may be unreadable; others replace them", at_most=1, may_change=True
    )
    val_skip_damaged: bool = option(
        False, "leave unreadable validation images out, and say so, instead of failing", may_change=True
    )

    image_resize: Optional[tuple[int, ...]] = option(
        None,
        "network input size in pixels: one number, or height width",
        heading="pixels (defaults come with the model)",
        at_least=1,
        at_most=8192,
    )
    crop_pct: Optional[float] = option(
        None, "share of the resized image that the evaluation's centre crop keeps", at_least=0.1, share=True
    )
    interpolation: Optional[str] = option(None, "resize filter", ("bilinear", "bicubic", "nearest", "lanczos"))
    mean: Optional[Numbers] = option(None, "mean of each channel, on a scale of 0 to 1")
    std: Optional[Numbers] = option(None, "standard deviation of each channel, on a scale of 0 to 1")

    scale: Numbers = option(
        (0.08, 1.0), "share of the area that a random crop takes, from to", heading="augmentation", above=0, at_most=1
    )
    ratio: Numbers = option((0.75, 1.3333333333333333), "aspect ratio of a random crop, from to", above=0, at_most=100)
    pad_crop: int = option(
        0, "pad by so many pixels and crop at the image's own size, instead of scale and ratio", at_most=8192
    )
    hflip: float = option(0.5, "probability of a horizontal flip", at_most=1)
    vflip: float = option(0.0, "probability of a vertical flip", at_most=1)
    color_jitter: Optional[Numbers] = option(
        None,
        "strength of brightness, contrast, saturation; not with auto_augment",
        at_most=5,
        hint="0.4 varies a factor from 0.6 to 1.4",
    )
    auto_augment: Optional[str] = option(None, "RandAugment and relatives, e.g. randaug-m9-mstd0.5-inc1")
    re_prob: float = option(0.0, "probability of random erasing", at_most=1)
    re_scale: Numbers = option((0.02, 0.33), "share of the area that is erased, from to", above=0, at_most=1)
    re_ratio: Numbers = option((0.3, 3.3), "aspect ratio of what is erased, from to", above=0, at_most=100)
    re_value: str = option("random", "what erased pixels become: normal noise, or the mean colour", ("random", "const"))
    mixup: float = option(0.0, "mixup's alpha; 0: off")
    cutmix: float = option(0.0, "cutmix's alpha; 0: off")
    cutmix_prob: float = option(1.0, "probability that a batch is mixed at all", at_most=1)
    mixup_switch_prob: float = option(0.5, "probability of cutmix rather than mixup when both are on", at_most=1)
    aug_repeats: int = option(0, "repeated augmentation: copies of each image in an epoch; 0: off", at_most=100)
    mixup_off_epoch: int = option(0, "epochs after which mixup and cutmix are off; 0: never")
    sampler: str = option(
        "random",
        "random: every image once an epoch; balanced: as many of each class, those of small classes several times",
        ("random", "balanced"),
    )

    reduce_zero_label: Optional[bool] = option(
        None,
        "0 in a mask is no class, and 1 the first; default: of ADE20K only",
        heading="segmentation and detection",
    )
    multi_scale: tuple[int, ...] = option(
        (),
        "training of detectors: shorter sides, one of which is drawn in the place of img_scale's",
        at_least=1,
        at_most=8192,
    )
    max_boxes: int = option(
        100,
        "training of detectors: objects of an image; of more, so many are drawn each time",
        at_least=1,
        at_most=10_000,
    )
    iou_crop: bool = option(
        True, "training of ssdlite: crop at random, to a part whose IoU with an object is at least a random threshold"
    )
    train_images: str = option(
        "", "folder of the training images, as it is or below data_dir; default: as COCO's layout", may_change=True
    )
    val_images: str = option("", "folder of the validation images, as train_images", may_change=True)
    skip_missing: bool = option(
        False, "leave out images that an annotation file names and that are not there", may_change=True
    )
    score_threshold: Optional[float] = option(
        None, "objects of no higher score are left out; default: the method's", at_most=1, may_change=True
    )
    max_detections: Optional[int] = option(
        None, "detections of an image that count; default: 100", at_least=1, at_most=10_000, may_change=True
    )
    output_stride: Optional[int] = option(
        None, "stride of the backbone's last map; default: the model's (8 of deeplabv3, else 32)", (8, 16, 32)
    )
    head_channels: Optional[int] = option(
        None,
        "channels of the head; default: the method's (semantic_fpn 128, and twice as many in its neck; else 512)",
        at_least=2,
        at_most=4096,
    )
    img_scale: Optional[tuple[int, ...]] = option(
        None,
        "resize to at most this longer and shorter side, keeping the ratio; default: the checkpoint's, else 2048 512",
        at_least=1,
        at_most=8192,
    )
    ratio_range: Numbers = option(
        (0.5, 2.0), "training: img_scale times a random factor, from to", above=0, at_most=100
    )
    short_side: Optional[tuple[int, ...]] = option(
        None,
        "training, in the place of img_scale: the shorter side gets so many pixels, from to, the longer at most "
        "longest_side",
        at_least=1,
        at_most=8192,
    )
    longest_side: int = option(1024, "see short_side", at_least=1, at_most=8192)
    cat_max_ratio: float = option(
        0.75, "training: share of a crop that one class should stay below; 1: any crop will do", above=0, at_most=1
    )
    photometric: bool = option(True, "training: random brightness, contrast, saturation, hue")
    rotate: float = option(0.0, "training: random rotation by at most so many degrees", at_most=180)
    blur: float = option(0.0, "training: probability of a Gaussian blur", at_most=1)
    resize_library: Optional[str] = option(
        None,
        "whose pixels a resized image has: OpenCV's (MMSegmentation) or Pillow's (ml-cvnets); default: the "
        "checkpoint's, else opencv",
        ("opencv", "pillow"),
    )
    val_resize: Optional[str] = option(
        None,
        "evaluation: resize to img_scale (keep_ratio), to image_resize (fixed; the ratio is lost), or not (none); "
        "default: the checkpoint's, else keep_ratio",
        ("keep_ratio", "fixed", "none"),
    )
    size_divisor: Optional[int] = option(
        None,
        "evaluation: then resize to sides that this divides (VAN: 32); default: the checkpoint's, else 1",
        at_least=1,
        at_most=1024,
    )
    slide_stride: Optional[tuple[int, ...]] = option(
        None,
        "evaluation: see images through a sliding window of image_resize, with this step (one number, or height "
        "width); default: whole",
        at_least=1,
        at_most=8192,
        may_change=True,
    )
    scales: Numbers = option(
        (1.0,), "validate: mean over these scales of an image", above=0, at_most=100, may_change=True
    )
    flip: bool = option(False, "validate: see mirror images as well", may_change=True)

    epoch_size: int = option(300, "epochs in all, cooldown included", heading="optimisation", at_least=1)
    max_steps: int = option(
        0, "updates in all; the schedule then counts in updates, and epoch_size has no effect; 0: epoch_size counts"
    )
    opt: str = option("adamw", "optimiser", ("adamw", "adam", "sgd", "momentum", "lion", "rmsprop", "lamb", "lars"))
    lr: float = option(1e-3, "highest learning rate", above=0)
    beta1: float = option(0.9, "first decay of adamw, adam, lion and lamb", below=1)
    beta2: float = option(0.999, "second decay of adamw, adam, lion and lamb", below=1)
    momentum: float = option(0.9, "momentum of sgd, momentum, rmsprop and lars", below=1)
    use_nesterov: bool = option(False, "Nesterov's momentum, with sgd and momentum")
    weight_decay: float = option(0.05, "weight decay")
    weight_decay_filter: str = option(
        "norm_and_bias",
        "norm_and_bias: none on biases and other 1-D parameters; norm: none on a backbone's norms (as MMSegmentation's "
        "recipes by name); disable: on all",
        ("norm_and_bias", "norm", "disable"),
    )
    scheduler: str = option("cosine_decay", "learning-rate schedule", SCHEDULERS)
    min_lr: float = option(
        1e-6, "lowest learning rate of cosine_decay, polynomial_decay and plateau, and of the cooldown"
    )
    warmup_epochs: int = option(5, "epochs of linear warm-up")
    warmup_steps: int = option(
        0,
        "updates of linear warm-up in the place of warmup_epochs: a factor that rises from warmup_lr / lr to 1 "
        "multiplies the schedule; 0: warmup_epochs counts",
    )
    warmup_lr: float = option(1e-6, "learning rate at the start of the warm-up")
    cooldown_epochs: int = option(0, "epochs at min_lr in the end")
    decay_epochs: int = option(30, "epochs between two steps of step_decay", at_least=1)
    decay_rate: float = option(0.1, "factor of step_decay and multi_step_decay", above=0, at_most=1)
    multi_step_decay_milestones: tuple[int, ...] = option(
        (), "epochs after which multi_step_decay multiplies the learning rate with decay_rate", at_least=1
    )
    power: float = option(1.0, "exponent of polynomial_decay; 1: a straight line", above=0, at_most=100)
    lr_epoch_stair: bool = option(True, "the learning rate changes at epochs only (as in timm), not at every step")
    loss: str = option("CE", "loss function", ("CE", "BCE"))
    label_smoothing: float = option(0.1, "label smoothing", below=1)
    clip_grad: bool = option(False, "clip the gradients' global norm", hint="its number is clip_value")
    clip_value: float = option(5.0, "largest global norm, with clip_grad", at_least=1e-6)
    gradient_accumulation_steps: int = option(1, "batches that make one update", at_least=1)
    ema: bool = option(False, "average the weights, and evaluate the average")
    val_raw: bool = option(
        True, "with ema: evaluate the raw weights too, so that the better ones are kept as best", may_change=True
    )
    ema_decay: float = option(
        0.9998,
        "share of the old value that the average keeps at each update",
        at_least=0.5,
        at_most=0.99999,
        hint="the share of the old average that stays: MMPretrain's momentum 0.0002 is 0.9998",
    )
    layer_decay: Optional[float] = option(
        None,
        "layer-wise decay: the learning rate of each block is this factor times that of the block after it",
        above=0,
        at_most=1,
    )
    backbone_lr_factor: float = option(
        1.0,
        "factor of the learning rate of everything but the classifier",
        above=0,
        hint="to train nothing but the classifier: --freeze_backbone",
    )
    class_weights: Words = option(
        (), "weight of each class in the loss: balanced (inverse to its images), or one number a class", metavar="X"
    )
    early_stopping: int = option(0, "end after so many evaluations without a better top-1; 0: never", may_change=True)
    patience: int = option(10, "plateau: evaluations without a better top-1 that the learning rate waits out")
    factor: float = option(0.1, "plateau: what the learning rate is multiplied with after that", at_least=1e-6, below=1)
    sync_bn: bool = option(False, "batch norms take the statistics of all processes' images (GPU and Ascend)")

    amp_level: str = option(
        "O0", "mixed precision, as in mindspore.amp", ("O0", "O2", "O3", "auto"), heading="precision"
    )
    loss_scale_type: str = option("fixed", "fixed or dynamic loss scale", ("fixed", "dynamic"))
    loss_scale: float = option(1.0, "loss scale (initial, when dynamic)", at_least=2.0**-24, at_most=2.0**24)
    dataset_sink_mode: bool = option(False, "feed batches through the device's queue (GPU and Ascend)", may_change=True)

    ckpt_save_dir: str = option(
        "",
        "folder for checkpoints, metrics, curves; default: output/MODEL",
        heading="output",
        path=True,
        may_change=True,
    )
    resume: bool = option(
        True, "go on from the newest good checkpoint in ckpt_save_dir; false: refuse to touch a run", may_change=True
    )
    extend: bool = option(
        False,
        "with another epoch_size: go on although the schedule is another; from here on with that of the new length",
        may_change=True,
    )
    allow_other_environment: bool = option(
        False,
        "go on although versions, operators or processor differ: the numbers may differ in their last digits",
        may_change=True,
    )
    keep_checkpoint_max: int = option(3, "best checkpoints to keep (besides the newest two)", may_change=True)
    ckpt_save_interval: int = option(1, "epochs between checkpoints", at_least=1, may_change=True)
    ckpt_save_steps: int = option(0, "steps between further checkpoints within an epoch; 0: none", may_change=True)
    val_while_train: bool = option(True, "evaluate during training", may_change=True)
    val_interval: int = option(1, "epochs between evaluations", at_least=1, may_change=True)
    val_steps: int = option(
        0, "steps between evaluations in the place of val_interval; 0: val_interval counts", may_change=True
    )
    log_interval: int = option(50, "steps between rows of metrics.csv", at_least=1, may_change=True)
    max_skipped_steps: int = option(
        50, "stop after so many updates in a row without a finite loss", at_least=1, may_change=True
    )
    result_json: str = option("", "validate: write the results to this file", path=True, may_change=True)
    result_csv: str = option(
        "", "validate: write a row of results for each checkpoint to this file", path=True, may_change=True
    )
    class_csv: str = option(
        "", "validate: write a row of figures for each class to this file (CSV)", path=True, may_change=True
    )
    details: str = option(
        "",
        "validate: write every image's path, label and most probable classes to this file (CSV); of segmentation, its "
        "path and figures",
        path=True,
        may_change=True,
    )
    mask_classes: bool = option(
        True,
        "validate, with classes: choose among these only, as timm does for ImageNet-A and ImageNet-R; false: among all",
        may_change=True,
    )
    tta: Optional[str] = option(
        None, "validate: flip takes the mean of the logits of an image and its mirror image", ("flip",), may_change=True
    )
    real_labels: str = option(
        "",
        "validate: JSON file with the labels of each validation image in the order of their files' names (ReaL)",
        path=True,
        may_change=True,
    )
    more_ckpt_paths: tuple[str, ...] = option(
        (), "validate: further checkpoints; --ckpt_path A B C sets them", may_change=True
    )
    corruptions: Words = option(
        (),
        "validate: top-1 on corrupted images, and mean corruption errors: all (19), common (15), or names of "
        "ImageNet-C's corruptions",
        metavar="NAME",
        may_change=True,
    )
    severities: tuple[int, ...] = option(
        (1, 2, 3, 4, 5), "validate, with corruptions: the severities", at_least=1, at_most=5, may_change=True
    )
    corruptions_dir: str = option(
        "",
        "validate, with corruptions: folder in ImageNet-C's layout, CORRUPTION/SEVERITY/CLASS/IMAGE; default: they are "
        "made of the validation images",
        path=True,
        may_change=True,
    )
    corruptions_plot: str = option(
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
                    check_number(entry.name, number, entry.metadata)
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
        if task == "detection" and self.model:
            ssdlite = self.model.startswith("ssdlite_")
            for name in OF_OTHER_DETECTORS if ssdlite else OF_SSDLITE:
                if getattr(self, name) != getattr(Config, name):
                    kind, size = ("retinanet and mask_rcnn", "image_resize") if ssdlite else ("ssdlite", "img_scale")
                    raise ConfigError(
                        f"{name} is a setting of {kind}, but the model is {self.model}; leave it out"
                        + (f" (the size of its images is {size})" if name in SIZES else "")
                    )

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
                number = converted("class_weights", word, float, "class_weights")
                check_number("class_weights", number, {})
        if self.class_weights and self.loss != "CE":
            raise ConfigError(f"class_weights are of the loss CE, but loss is {self.loss}; try --sampler balanced")
        if self.class_weights == ("balanced",) and self.sampler == "balanced":
            raise ConfigError("class_weights balanced and sampler balanced do the same twice; choose one of them")
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
    "task", "class_csv", "reduce_zero_label", "output_stride", "head_channels", "img_scale", "resize_library",
    "val_resize", "size_divisor", "slide_stride", "scales", "flip", "val_images", "skip_missing", "score_threshold",
    "max_detections", "corruptions", "severities", "corruptions_dir", "corruptions_plot",
))  # fmt: skip


def converted(name: str, value: Any, expected: Any, source: str) -> Any:
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
        return tuple(converted(name, v, item, source) for v in values)
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


def settings_that(rule: str) -> set[str]:
    """The settings with a rule of `_option` that is either there or not: "may_change", "first_start"."""
    return {entry.name for entry in dataclasses.fields(Config) if entry.metadata.get(rule)}
