"""Recipes that were written for MindCV: what they ask for is done under our names, or named all at once."""

import pytest

from mindska import config, mindcv_recipes
from mindska.config import ConfigError, parse_args, read_yaml

# Every option of MindCV's command, and the further keys of its recipes.
KEYS = [
    "mode",
    "distribute",
    "val_while_train",
    "val_interval",
    "log_interval",
    "seed",
    "device_target",
    "dataset",
    "data_dir",
    "train_split",
    "val_split",
    "dataset_download",
    "num_parallel_workers",
    "shuffle",
    "num_samples",
    "batch_size",
    "drop_remainder",
    "image_resize",
    "scale",
    "ratio",
    "hflip",
    "vflip",
    "color_jitter",
    "interpolation",
    "auto_augment",
    "aug_splits",
    "re_prob",
    "re_scale",
    "re_ratio",
    "re_value",
    "re_max_attempts",
    "mean",
    "std",
    "crop_pct",
    "mixup",
    "cutmix",
    "cutmix_prob",
    "aug_repeats",
    "model",
    "num_classes",
    "in_channels",
    "drop_rate",
    "drop_path_rate",
    "pretrained",
    "ckpt_path",
    "resume_opt",
    "keep_checkpoint_max",
    "ckpt_save_dir",
    "ckpt_save_interval",
    "ckpt_save_policy",
    "epoch_size",
    "dataset_sink_mode",
    "ema",
    "ema_decay",
    "clip_grad",
    "clip_value",
    "layer_decay",
    "gradient_accumulation_steps",
    "opt",
    "momentum",
    "weight_decay",
    "use_nesterov",
    "weight_decay_filter",
    "eps",
    "scheduler",
    "lr",
    "min_lr",
    "warmup_epochs",
    "warmup_factor",
    "decay_epochs",
    "decay_rate",
    "multi_step_decay_milestones",
    "lr_epoch_stair",
    "num_cycles",
    "cycle_decay",
    "loss",
    "label_smoothing",
    "aux_factor",
    "reduction",
    "amp_level",
    "val_amp_level",
    "amp_cast_list",
    "loss_scale_type",
    "loss_scale",
    "drop_overflow_update",
    "eval_shuffle",
    "save_checkpoint",
    "filter_bias_and_bn",
    "dynamic_loss_scale",
    "enable_modelarts",
    "data_url",
    "multi_data_url",
    "ckpt_url",
    "train_url",
    "pretrain_resize",
    "pretrain_interpolations",
    "mask_type",
    "mask_ratio",
]

RECIPE = """
mode: 0
distribute: True
dataset: 'imagenet'
data_dir: '/path/to/imagenet'
shuffle: True
dataset_download: False
batch_size: 64
drop_remainder: True
image_resize: 224
ratio: [0.75, 1.333]
interpolation: 'bicubic'
auto_augment: 'randaug-m7-mstd0.5'
color_jitter: 0.4
re_value: 0
model: 'resnet18'
pretrained: False
ckpt_path: ''
ckpt_save_policy: 'latest_k'
epoch_size: 120
amp_level: 'O2'
val_amp_level: 'O2'
loss_scale_type: 'auto'
loss: 'ce'
scheduler: 'warmup_cosine_decay'
lr: 2e-3
min_lr: 0
warmup_epochs: 10
warmup_factor: 0.01
decay_epochs: 100
opt: 'adamw'
filter_bias_and_bn: False
weight_decay: 0.05
use_nesterov: False
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_every_key_of_mindcv_is_known():
    known = {*config.TYPES, *mindcv_recipes.HAPPENS_ANYWAY, *mindcv_recipes.RENAMED}
    assert not set(KEYS) - known


def test_a_recipe_of_mindcv_means_what_it_means_there(tmp_path):
    read = parse_args(["--config", write(tmp_path, RECIPE), "--data_dir", "DATA"])
    expected = dict(
        mode="graph", distribute=True, data_dir="DATA", batch_size=64, image_resize=(224,), color_jitter=None,
        auto_augment="randaug-m7-mstd0.5", re_value="const", model="resnet18", loss_scale_type="dynamic", loss="CE",
        scheduler="cosine_decay", lr=2e-3, min_lr=0.0, warmup_epochs=10, warmup_lr=pytest.approx(2e-5),
        cooldown_epochs=10, opt="adamw", weight_decay_filter="disable", weight_decay=0.05,
        # left out in the recipe
        lr_epoch_stair=False, label_smoothing=0.0, ema_decay=0.9999,
    )  # fmt: skip
    assert {name: getattr(read, name) for name in expected} == expected
    said = "\n".join(config.notes)
    assert "What it leaves out is as in MindCV: " in said and "lr_epoch_stair false" in said
    assert "color_jitter has no effect beside auto_augment" in said


@pytest.mark.parametrize(
    "lines, expected",
    [
        ("shuffle: true\nmode: 1", dict(mode="pynative", color_jitter=(0.4,), opt="adam", warmup_lr=0.0)),
        ("shuffle: true\nauto_augment: null\ncolor_jitter: 0.2", dict(color_jitter=(0.2,))),
        ("shuffle: true\nwarmup_epochs: null\nlr: null\nmean: [a, b, c]", None),
        ("shuffle: true\nwarmup_epochs: null\nlr: null", dict(warmup_epochs=3, lr=1e-3)),
        ("dynamic_loss_scale: true", dict(loss_scale_type="dynamic")),
        ("filter_bias_and_bn: true", dict(weight_decay_filter="norm_and_bias")),
        ("shuffle: true\nweight_decay_filter: auto", dict(weight_decay_filter="disable")),
        ("shuffle: true\nmean: [127.5, 127.5, 127.5]\nstd: [51, 51, 51]", dict(mean=(0.5,) * 3, std=(0.2,) * 3)),
        ("shuffle: true\nloss_scale_type: auto", dict(loss_scale_type="fixed")),
        ("shuffle: true\nmulti_step_decay_milestones: [30, 60]", dict(scheduler="cosine_decay")),
    ],
)  # fmt: skip
def test_keys_and_values_with_another_name(tmp_path, lines, expected):
    if expected is None:
        with pytest.raises(SystemExit):
            parse_args(["--config", write(tmp_path, lines)])
        return
    read = parse_args(["--config", write(tmp_path, lines)])
    assert {name: getattr(read, name) for name in expected} == expected


def test_values_have_mindcvs_names_on_the_command_line_too(tmp_path):
    for words, name, value in (
        (["--mode", "1"], "mode", "pynative"),
        (["--scheduler", "warmup_cosine_decay"], "scheduler", "cosine_decay"),
        (["--loss", "bce"], "loss", "BCE"),
    ):
        assert getattr(parse_args(words), name) == value
    assert read_yaml(write(tmp_path, "mode: 0\n")) == {"mode": "graph"} and not config.notes


@pytest.mark.fault("mindcv-recipe")
def test_keys_without_meaning_are_named_all_at_once(tmp_path, capsys):
    path = write(tmp_path, RECIPE + "aux_factor: 0.1\nnum_cycles: 2\ndata_url: /a\n" + "eps: 1e-10\n")
    with pytest.raises(SystemExit) as error:
        parse_args(["--config", path])
    said = capsys.readouterr().err
    assert error.value.code == 2 and "--ignore_unknown passes over them" in said and "keys (4):" in said
    for line in (
        "aux_factor: 0.1 (the loss has one part)",
        "num_cycles: 2 (",
        "data_url: /a (for ModelArts)",
        "eps: 1",
    ):
        assert f"\n  {line}" in said
    read = parse_args(["--config", path, "--ignore_unknown"])
    assert read.lr == 2e-3 and read.epoch_size == 120
    (line,) = [line for line in config.notes if "--ignore_unknown" in line]
    assert line.startswith(f"{path} is a recipe of MindCV's. Passed over") and "num_cycles: 2" in line


def test_a_misspelt_key_is_an_error_all_the_same(tmp_path):
    path = write(tmp_path, RECIPE + "batchsize: 3\nlearning_rat: 1\n")
    with pytest.raises(ConfigError, match="unknown keys 'batchsize'; did you mean 'batch_size'.*'learning_rat'"):
        read_yaml(path, ignore_unknown=True)
    for line in ("warmup_factor: much", "lr: fast"):
        with pytest.raises(ConfigError, match=f"{line.split(':')[0]} is '{line.split(': ')[1]}'; expected a number"):
            read_yaml(write(tmp_path, f"shuffle: true\n{line}\n"))
