"""From a configuration to the objects it names: network, pixels, loss, step."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Optional

import mindcv
import mindspore as ms
import numpy as np
from mindcv.loss import create_loss
from mindspore import Parameter, Tensor, nn

from . import acceleration, kernels, names
from .config import Config, notes
from .data import (
    Augmentation,
    Preprocessing,
    check_same_classes,
    check_same_on_all_ranks,
    natural_order,
    open_dataset,
    split_by_ratio,
)
from .data.base import relabelled
from .data.datasets import Dataset, check_known, chosen_classes
from .data.folders import is_folder
from .data.shards import find_shards
from .device_support import check_device
from .distributed import World, world
from .errors import ConfigError, SettingError, WeightsError, few, look_alike
from .modes import pynative_mode
from .training.finetune import freeze, frozen_parts, is_part
from .training.record import early_messages
from .training.step import StepOptions
from .training.sync_bn import synchronise
from .weights import Weights, methods, non_default_options, open_weights
from .weights.methods import own_preprocessing

log = logging.getLogger("mindska")


def device_target(config: Config) -> str:
    """The configured device target; "auto" takes the best that this machine has."""
    if config.device_target != "auto":
        return config.device_target
    for target, device in (("Ascend", ms.device_context.ascend), ("GPU", ms.device_context.gpu)):
        if device.is_available():
            return target
    return "CPU"


def set_up(config: Config, world: World) -> None:
    """Sets MindSpore's mode, the seed (the same on all ranks: they start from the same weights), and what is logged."""
    if config.distribute is not None and config.distribute != (world.size > 1):
        raise ConfigError(
            f"distribute is {config.distribute}, but the number of processes is {world.size}; start with mpirun or "
            f"msrun for several, without for one"
        )
    check_device(config, ms.get_context("device_target"))
    ms.set_context(mode=ms.GRAPH_MODE if config.mode == "graph" else ms.PYNATIVE_MODE)
    ms.set_seed(config.seed)
    set_up_log(world.rank == 0)
    log.addHandler(early_messages)
    for note in notes:
        log.info("%s", note)
    if config.amp_level != "O0" and ms.get_context("device_target") == "CPU":
        log.info(
            "amp_level %s computes in float16, which CPUs are slow at; --amp_level O0 computes in float32",
            config.amp_level,
        )


def set_up_log(first: bool = True) -> None:
    """What goes to stderr: messages of our own from INFO on, of others from WARNING on; `first`: this is rank 0."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.INFO)
    log.setLevel(logging.DEBUG if first else logging.WARNING)


def build_preprocessing(config: Config, recorded: Optional[dict[str, Any]] = None) -> Preprocessing:
    """How images become the network's input: the configuration, else the checkpoint's record, else the model's own."""
    default = Preprocessing(**(recorded or own_preprocessing(config.model)))
    default = default.for_channels(config.in_channels or default.in_channels)
    changes = {name: getattr(config, name) for name in ("crop_pct", "interpolation", "mean", "std")}
    if config.image_resize is not None:
        changes["image_size"] = config.image_resize * 2 if len(config.image_resize) == 1 else config.image_resize
    pixels = dataclasses.replace(default, **{name: value for name, value in changes.items() if value is not None})
    if pixels.in_channels != default.in_channels:
        raise ConfigError(
            f"mean {pixels.mean} and std {pixels.std} are of {pixels.in_channels} channels, but images have "
            f"{default.in_channels}; --in_channels {pixels.in_channels} makes them of as many"
        )
    return pixels


def build_augmentation(config: Config) -> Augmentation:
    """The configuration's augmentation of training images."""
    return Augmentation(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Augmentation)})


def loading_options(config: Config) -> dict[str, Any]:
    """The configuration's options of `TrainLoader` that are no business of a single image."""
    mixing = ("mixup", "cutmix", "cutmix_prob", "mixup_switch_prob", "mixup_off_epoch")
    names = ("max_damaged", "aug_repeats", "sampler", *mixing)
    return {name: getattr(config, name) for name in names}


def dataset_options(config: Config) -> dict[str, Any]:
    """The configuration's options of `open_dataset` on the order of classes and on reading images."""
    names = ("class_map", "exif_orientation", "allow_outside_data_dir")
    return {name: getattr(config, name) for name in names}


def open_training_data(config: Config, validation: Optional[bool] = None) -> tuple[Dataset, Optional[Dataset]]:
    """The training and the validation images, which are the same on all ranks.

    `validation`: whether the latter are asked for; default: if the run evaluates.

    Raises:
        DataError: something is missing or not what it should be; the two have different classes.
    """
    validation = config.val_while_train if validation is None else validation
    options = dict(dataset_options(config), classes=config.classes)
    train: Dataset
    val: Optional[Dataset]
    if config.val_ratio:
        train, val = _split(config, **options)
        check_same_on_all_ranks(train)
        check_same_on_all_ranks(val)
        return train, val if validation else None
    train = open_dataset(config.dataset or "", config.data_dir, config.train_split, **options)
    check_same_on_all_ranks(train)
    if not validation:
        return train, None
    options.update(trained_on=train.class_names)
    val = open_dataset(config.dataset or "", config.data_dir, config.val_split, **options)
    check_same_on_all_ranks(val)
    check_same_classes(train, val)
    return train, val


def open_validation_data(config: Config, record: dict[str, Any]) -> Dataset:
    """The validation images for a network, which are the same on all ranks: those of `classes`, where it names some.

    Args:
        record: of the weights.

    Raises:
        DataError: something is missing or not what it should be.
    """
    recorded = record.get("class_names")
    options = dict(dataset_options(config), trained_on=recorded)
    if config.val_ratio:
        train, dataset = _split(config, **options)
        known = record.get("train_set")
        if known and not config.classes and known != train.identity():
            log.warning(
                "val_ratio %g and val_seed %d give other training images than those that the checkpoint was trained "
                "on: it may have seen some that it is evaluated on",
                config.val_ratio, config.val_seed,
            )  # fmt: skip
    else:
        settings = record.get("config")
        if isinstance(settings, dict) and (held := settings.get("val_ratio")):
            log.info(
                "The checkpoint was trained with --val_ratio %s --val_seed %s; these options evaluate it on the images "
                "that were kept from it, listed in val_files.csv of its run",
                held, settings.get("val_seed"),
            )  # fmt: skip
        dataset = open_dataset(config.dataset or "", config.data_dir, config.val_split, **options)
    check_same_on_all_ranks(dataset)
    if not config.classes:
        return dataset
    chosen = chosen_classes(config.classes)
    check_known(chosen, dataset.class_names, str(dataset.root))
    names = recorded or dataset.class_names
    if unknown := sorted(set(chosen) - set(names)):
        raise ConfigError(f"classes names {unknown[:10]}, which the network of {config.ckpt_path} does not know")
    wanted = set(chosen)
    kept = [name if name in wanted else "" for name in dataset.class_names]
    dataset = relabelled(dataset, names, kept, f"{dataset.split}, {len(wanted):,} classes")
    log.info("%s", dataset)
    return dataset


def _split(config: Config, **options: Any) -> tuple[Dataset, Dataset]:
    """The two parts of the training images that val_ratio makes. `DATA/CLASS/` will do in the place of
    `DATA/train/CLASS/`."""
    split, folder = config.train_split, Path(config.data_dir)
    here = split == Config.train_split and config.dataset == "imagenet" and str(config.data_dir)
    if here and is_folder(folder) and not is_folder(folder / split) and not find_shards(folder, split):
        split = "."
    elif here and is_folder(folder / Config.val_split):
        log.info("val_ratio %g: %s is not used", config.val_ratio, folder / Config.val_split)
    parts = split_by_ratio(
        open_dataset(config.dataset or "", folder if str(config.data_dir) else "", split, **options),
        config.val_ratio,
        config.val_seed,
    )
    for part in parts:
        log.info("%s", part)
    return parts


def loader_share(config: Config, world: World) -> dict[str, Any]:
    """Which share of the batches this process loads, and with how many threads: its share of the cores."""
    workers = config.num_parallel_workers or max(2, world.threads)
    return dict(rank=world.rank, world_size=world.size, num_workers=workers)


def configured_weights(config: Config) -> Optional[Weights]:
    """The weights that the configuration names, if any: the model's, or those of its backbone, which may come from a
    classifier, or from another segmenter or detector.

    Raises:
        WeightsError: they are neither.
    """
    if not config.ckpt_path:
        return None
    method, backbone = names.method_and_backbone(config.model)
    try:
        return open_weights(config.ckpt_path, config.model, config.use_ema, any_model=True)
    except WeightsError as error:
        if not method:
            raise
        weights = _weights_of_backbone(config, backbone)
        if weights is None:
            raise error
    log.info(
        "%s has weights of %s: the backbone starts from them, what is built on it anew",
        config.ckpt_path, weights.model,
    )  # fmt: skip
    return weights if weights.model == backbone else weights.of_backbone()


def _weights_of_backbone(config: Config, backbone: str) -> Optional[Weights]:
    """Those in the file if they are of a classifier of this name, or of something that is built on it."""
    for model in (backbone, ""):
        try:
            weights = open_weights(config.ckpt_path, model, config.use_ema)
        except WeightsError:
            continue
        if names.method_and_backbone(weights.model)[1] == backbone:
            return weights
    return None


def with_recorded_model(config: Config, record: dict[str, Any]) -> Config:
    """The configuration for the model that a checkpoint's record names, when it names one.

    Raises:
        ConfigError: neither names one, or the weights take other channels than are configured.
    """
    recorded = record.get("model") or ""
    if not (recorded or config.model):
        raise ConfigError(f"{config.ckpt_path} does not say which model it is; name it with --model")
    channels = len(record["preprocessing"]["mean"]) if record.get("preprocessing") else config.in_channels
    if config.in_channels not in (None, channels):
        raise ConfigError(
            f"{config.ckpt_path} takes images of {channels} channels, but in_channels is {config.in_channels}; "
            f"leave it out"
        )
    return config if config.model else dataclasses.replace(config, model=recorded)


def evaluated_classes(config: Config, record: dict[str, Any], class_names: list[str]) -> int:
    """The number of classes of the network to evaluate: that of the checkpoint, the configured one, or the data's.

    Raises:
        ConfigError: the first two differ, the data's class folders are not the classes that it was trained on, or it is
            not known which folder is which class.
    """
    recorded, number = record.get("class_names"), record.get("num_classes") or config.num_classes
    if config.num_classes not in (None, number):
        raise ConfigError(
            f"{config.ckpt_path} has {number} classes, but num_classes is {config.num_classes}; leave it out "
            f"(or --num_classes null, where a recipe sets it)"
        )
    if recorded is None and number not in (None, len(class_names)):
        raise ConfigError(
            f"The network has {number} classes and its checkpoint does not say which, the data has {len(class_names)}: "
            f"the order of the folders would not be that of the classes. Evaluate on all of them"
            + (", or record what they are called (mindska convert --class_names)." if record else ".")
        )
    if recorded is None and not config.class_map and config.dataset == "imagenet":
        natural = natural_order(class_names)
        if natural != class_names:
            first = next(i for i, pair in enumerate(zip(class_names, natural)) if pair[0] != pair[1])
            raise ConfigError(
                f"The checkpoint does not say what its classes are called, and the order of the folders is ambiguous: "
                f"class {first} is {class_names[first]!r} in the order of text (torchvision, MindCV) and "
                f"{natural[first]!r} in the natural order (timm). Give --class_map FILE: the folders' names, one a "
                f"line, in the order of the network's outputs"
            )
    if recorded is not None and sorted(recorded) == sorted(class_names) and recorded != class_names:
        raise ConfigError(
            f"The checkpoint has its classes in another order than --class_map {config.class_map}: it was trained with "
            f"{', '.join(recorded[:5])}, ... Leave the class map out: folders of the same names take the checkpoint's"
        )
    if recorded is not None and recorded != class_names:
        missing, unknown = sorted(set(recorded) - set(class_names)), sorted(set(class_names) - set(recorded))
        raise ConfigError(
            f"The checkpoint knows {len(recorded)} classes, the data has {len(class_names)}: "
            f"missing in the data: {missing[:5]}, unknown to the checkpoint: {unknown[:5]}"
            f"{look_alike(unknown, missing)}. To evaluate on the classes that both have, name them with --classes"
        )
    return number or len(class_names)


def training_classes(config: Config, class_names: list[str]) -> int:
    """The number of classes of the network to train: as configured, or as many as the data has.

    Raises:
        ConfigError: the data has more than configured.
    """
    if config.num_classes is None:
        return len(class_names)
    if config.num_classes < len(class_names):
        raise ConfigError(
            f"num_classes is {config.num_classes}, but the data has {len(class_names)} classes "
            f"({', '.join(class_names[:5])}, ...); --num_classes null takes the data's"
        )
    if config.num_classes > len(class_names):
        log.info(
            "num_classes is %d, but the data has %d classes: the other outputs mean nothing; --num_classes null takes "
            "the data's",
            config.num_classes, len(class_names),
        )  # fmt: skip
    return config.num_classes


def weights_for_classes(
    config: Config, weights: Optional[Weights], class_names: list[str], num_classes: int
) -> Optional[Weights]:
    """The weights from which a training on these classes begins: where theirs are others, with a new classifier.

    Classes are told apart by name where the file knows them, else by their number. The same in another order are put
    into the data's order. One line says what becomes of the classifier.

    Args:
        num_classes: outputs of the network; at least as many as `class_names`.
    """
    if weights is None:
        return None
    file, known = weights.source.path.name, weights.record.get("class_names")
    found, wanted = weights.num_classes, len(class_names)
    outputs = "" if num_classes == wanted else f" (and {num_classes - wanted} outputs that mean nothing)"
    same = known is None or sorted(known) == sorted(class_names)
    if found != num_classes or not same:
        which = ""
        if found is not None and known is not None and not same:
            others = [name for name in class_names if name not in known]
            missing = [name for name in known if name not in class_names]
            which = f" (not in the file: {few(others, 5) or 'none'}; not in the data: {few(missing, 5) or 'none'})"
            which += look_alike(others, missing)
        log.info(
            "classifier: %s -> %d of the data%s, new%s; everything else from %s",
            f"none in {file}" if found is None else f"{found} classes of {file}", wanted, outputs, which, file,
        )  # fmt: skip
        return weights.with_new_classifier()
    if known is not None and known != class_names:
        log.info(
            "classifier: the %d classes of %s are the data's, in another order (%s): put into the data's (%s)",
            wanted, file, few(known, 3), few(class_names, 3),
        )  # fmt: skip
        order = [known.index(name) for name in class_names]
        return weights.reordered([*order, *range(len(known), num_classes)])
    if known is None and weights.record.get("classifier") != "initial values":
        log.info(
            "classifier: %s does not name its %d classes: they are taken for the data's, in this order (%s, ...)",
            file, num_classes, few(class_names, 3),
        )  # fmt: skip
        natural = natural_order(class_names)
        if config.dataset == "imagenet" and not config.class_map and natural != class_names:
            log.warning(
                "The order of the folders is ambiguous: this is that of text (torchvision, MindCV), timm's would be "
                "%s, ...; where %s is of timm's order, give --class_map FILE",
                few(natural, 3), file,
            )  # fmt: skip
    return weights


def check_labels(dataset: Dataset, training: bool) -> None:
    """Whether there is anything to tell apart; in evaluation, it only says that there is not.

    Raises:
        ConfigError: all training images are of one class.
    """
    names, counts = dataset.class_names, np.bincount(dataset.labels, minlength=len(dataset.class_names))
    empty = [name for name, count in zip(names, counts) if not count]
    if np.count_nonzero(counts) > 1:
        if empty:
            log.info("%d of %d classes have no image (%s)", len(empty), len(names), ", ".join(map(repr, empty[:10])))
        return
    said = f"All {len(dataset)} images are of one class ({names[int(np.argmax(counts))]!r})"
    if training:
        raise ConfigError(f"{said}: there is nothing to learn. Expected a folder for each of two classes or more.")
    log.info("%s: the accuracy says little", said)


def check_batch(config: Config, num_classes: int, pixels: Preprocessing, record: dict[str, Any]) -> None:
    """Whether a batch is enough for the network's batch norms: of one value a channel they make a constant.

    Raises:
        ConfigError: it is not.
    """
    if config.batch_size > 1 or config.freeze_backbone:
        return
    seen: dict[str, tuple[int, ...]] = {}
    with pynative_mode(), kernels.plain():  # only there cells have hooks
        net = _create(config, num_classes, pixels.in_channels, record.get("network", {}), pretrained=False)
        net.set_train(False)
        frozen = frozen_parts(config, [p.name for p in net.trainable_params()])
        for name, cell in net.cells_and_names():
            if isinstance(cell, (nn.BatchNorm1d, nn.BatchNorm2d)) and not is_part(name, frozen):
                cell.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].shape}))
        net(Tensor(np.zeros((1, pixels.in_channels, *pixels.image_size), np.float32)))
    ms.set_seed(config.seed)  # the network to train gets its own initial values
    single = [name for name, shape in seen.items() if np.prod(shape[2:]) == 1]
    if single:
        raise ConfigError(
            f"batch_size is 1, but {len(single)} batch norms of {config.model} (first: {single[0]}) see maps of 1x1: "
            f"of one value a channel they make a constant, and nothing before them learns. Raise batch_size"
            + ("" if len(single) == len(seen) else " or image_resize")
        )


def check_image_size(network: nn.Cell, pixels: Preprocessing) -> None:
    """Whether the network takes images of this size: before it is compiled. MindCV's other models do not say.

    Raises:
        ConfigError: they are too small.
    """
    try:
        getattr(network, "check_image_size", lambda *_: None)(*pixels.image_size)
    except SettingError as error:
        raise ConfigError(f"image_resize is {' '.join(map(str, pixels.image_size))}: {error}") from None


def build_network(
    config: Config,
    num_classes: int,
    in_channels: int = 3,
    weights: Optional[Weights] = None,
    record: Optional[dict[str, Any]] = None,
) -> nn.Cell:
    """The network, with its initial weights, in the configured precision, and without gradients where it is frozen.

    Args:
        weights: what to put in, or into its backbone; the first convolution's are adapted to `in_channels`.
        record: of the weights or of the checkpoint from which a run resumes, with the options of its network; default:
            that of `weights`.
    """
    record = record or (weights.record if weights else {})
    net = _create(config, num_classes, in_channels, record.get("network", {}), config.pretrained and not record)
    if weights is not None:
        own = weights.model == config.model
        weights.for_channels(in_channels).load_into(net if own else net.backbone)
    log.info("%s", acceleration.summary(net))
    if slow := acceleration.slow_convolutions(net):
        log.warning(
            "MindSpore %s is a hundred times slower than 2.8 at convolutions on CPU, and %s of this network have no "
            "C++ operator; pip install mindspore==2.8.0, or see docs/platforms.md",
            ms.__version__, slow,
        )  # fmt: skip
    if config.sync_bn:
        synchronise(net, world().size)
    if freeze(config, net) and not (record or config.pretrained):
        log.warning("What is frozen has random weights, since the run begins without --ckpt_path")
    return _in_precision(net, config)


def build_evaluation_network(config: Config, num_classes: int, in_channels: int, trained: nn.Cell) -> nn.Cell:
    """A second network like the one in training, for evaluation: the trainer puts its weights in."""
    net = _create(config, num_classes, in_channels, getattr(trained, "options", {}), pretrained=False)
    return _in_precision(net, config).set_train(False)


def _create(config: Config, num_classes: int, in_channels: int, options: dict[str, Any], pretrained: bool) -> nn.Cell:
    if not config.model:
        raise ConfigError("model is not set: name one, or take a recipe (`mindska recipes` lists them)")
    if config.model not in mindcv.list_models():
        names.check_model(config.model)
    keywords: dict[str, Any] = {name: getattr(config, name) for name in ("drop_rate", "drop_path_rate")}
    keywords.update(non_default_options(config.model, options))
    if (task := names.task_of(config.model)) != "classification":
        given = {name: value for name, value in keywords.items() if value is not None}
        if task == "detection":
            given.pop("drop_rate", None)  # their heads have no dropout
        else:
            own = dict(output_stride=config.output_stride, head_channels=config.head_channels)
            given.update((name, value) for name, value in own.items() if value is not None)
        return methods.create(config.model, num_classes=num_classes, in_channels=in_channels, **given)
    return mindcv.create_model(config.model, num_classes, pretrained, in_channels, **keywords)


def _in_precision(net: nn.Cell, config: Config) -> nn.Cell:
    if config.amp_level != "O0":
        ms.amp.auto_mixed_precision(net, config.amp_level)
        if ms.get_context("device_target") == "GPU":
            # MindSpore's networks in float16 are NHWC there, and the gradient of a dilated convolution reads the
            # dilation as NCHW: "'dilation' at 0 and 3 axis must be 1" (2.8.0).
            for _, cell in net.cells_and_names():
                if isinstance(cell, nn.Conv2d) and max(cell.dilation) > 1 and cell.group != cell.in_channels:
                    cell.to_float(ms.float32)
    return net


def checkpoint_record(
    config: Config, network: nn.Cell, class_names: list[str], pixels: Preprocessing
) -> dict[str, Any]:
    """What a checkpoint says of itself (as `mindska.weights.Weights.record`)."""
    said = dict(
        model=config.model,
        num_classes=config.num_classes or len(class_names),
        class_names=class_names,
        preprocessing=dataclasses.asdict(pixels),
    )
    options = non_default_options(config.model, getattr(network, "options", {}))
    return dict(said, network=options) if options else said


def build_loss(config: Config, dataset: Optional[Dataset] = None, num_classes: int = 0) -> nn.Cell:
    """MindCV's loss with the configured label smoothing and weights of the classes.

    Args:
        dataset: the training images, and num_classes: the network's outputs; needed for weights of the classes.
    """
    weights = {}
    if config.class_weights:
        if dataset is None:
            raise TypeError("class_weights need the training images")
        values = class_weights(config, dataset, num_classes)
        # A parameter: compiled graphs are kept by the settings, and must not hold the weights of other data.
        weights["weight"] = Parameter(Tensor(values), name="class_weights", requires_grad=False)
    return create_loss(config.loss, label_smoothing=config.label_smoothing, **weights)


def class_weights(config: Config, dataset: Dataset, num_classes: int) -> np.ndarray:
    """The weight of each class in the loss, (num_classes,) float32.

    "balanced", as in scikit-learn: images / (classes * images of the class); 0 for a class without images.

    Raises:
        ConfigError: there are not as many numbers as classes, or a class that has images has no weight.
    """
    counts = np.bincount(dataset.labels, minlength=num_classes)
    if config.class_weights == ("balanced",):
        present = counts > 0
        values = np.where(present, len(dataset) / (present.sum() * np.maximum(counts, 1)), 0)
    else:
        values = np.array([float(word) for word in config.class_weights])
        if len(values) != num_classes:
            raise ConfigError(
                f"class_weights has {len(values)} numbers, but the network has {num_classes} classes "
                f"({few(dataset.class_names, 5)}); give one for each, or: balanced"
            )
        if not values[counts > 0].all():
            name = dataset.class_names[int(np.flatnonzero((counts > 0) & (values == 0))[0])]
            raise ConfigError(f"class_weights is 0 for {name!r}, which has images; leave the folder out instead")
    said = [f"{name} {value:.3g}" for name, value in zip(dataset.class_names, values)]
    log.info("Weights of the classes in the loss: %s", few(said))
    return values.astype(np.float32)


def build_step_options(config: Config) -> StepOptions:
    """How a step updates the network."""
    return StepOptions(
        clip_value=config.clip_value if config.clip_grad else None,
        accumulation=config.gradient_accumulation_steps,
        ema_decay=config.ema_decay if config.ema else None,
        loss_scale=config.loss_scale,
        dynamic_loss_scale=config.loss_scale_type == "dynamic",
    )
