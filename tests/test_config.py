"""Configuration: types, unknown keys, command line over YAML, the recipes in configs/."""

from pathlib import Path

import pytest

from mindska import builders
from mindska.config import TASKS_OF, Config, ConfigError, differences, parse_args, read_yaml, settings_that, to_dict

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid_and_says_how_it_is_run(recipe):
    config = parse_args(["--config", str(recipe)])
    head = recipe.read_text().split("\n\n")[0]
    assert f"--config configs/{recipe.name}" in head
    others = [parse_args(["--config", str(other)]).ckpt_save_dir for other in RECIPES if other != recipe]
    assert config.ckpt_save_dir not in others and config.ckpt_save_dir.startswith("output/")
    for word in ("Values:", "Result:"):
        assert word in head, f"the head comment must say {word}"


def test_the_command_line_wins(tmp_path):
    path = write(tmp_path, "lr: 1e-3\nbatch_size: 8\nimage_resize: 64\nema: true\n")
    config = parse_args(["--config", path, "--batch_size", "16", "--ema", "false", "--image_resize", "96", "64"])
    assert (config.lr, config.batch_size, config.ema, config.image_resize) == (1e-3, 16, False, (96, 64))
    assert parse_args(["--ema"]).ema is True and parse_args(["--distribute"]).distribute is True
    assert parse_args(["--drop_rate", "null"]).drop_rate is None
    assert parse_args(["--data_dir", "2024"]).data_dir == "2024"


@pytest.mark.parametrize(
    "text, message",
    [
        ("epochs: 3", "unknown key 'epochs'"),
        ("batchsize: 3", "did you mean 'batch_size'"),
        ("batch_size: 1.5", "batch_size is 1.5; expected int"),
        ("batch_size: true", "batch_size is True; expected int"),
        ("ema: yes please", "ema is 'yes please'; expected bool"),
        ("lr: fast", "lr is 'fast'; expected float"),
        ("mean: [0.5, x, 0.5]", "mean is 'x'; expected float"),
        ("- a list", "expected lines of"),
        ("model: !!python/object/apply:os.system [echo]", "is not plain YAML"),
        ("a: b: c", "is not plain YAML"),
    ],
)
def test_a_bad_file_is_an_error(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        read_yaml(write(tmp_path, text))


@pytest.mark.fault("other-tasks")
def test_settings_of_other_tasks_are_refused():
    """Each, by every task that it has no meaning for."""
    models = dict(classification="skanet_s", segmentation="upernet_van_tiny", detection="ssdlite_skanet_s")
    for name, tasks in TASKS_OF.items():
        given = not getattr(Config, name)  # whatever it is, this is another value
        for task in models.keys() - set(tasks):
            with pytest.raises(ConfigError, match=f"{name} is a setting of .*, but the task is {task}; leave it out"):
                Config(model=models[task], **{name: given})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--opt", "foo"], "opt is 'foo'; expected one of adamw"),
        (["--ema", "maybe"], "ema is 'maybe'; expected bool"),
        (["--lr", "x"], "lr is 'x'; expected float"),
        (["--batch_size", "0"], "batch_size is 0; expected at least 1"),
        (["--hflip", "2"], "hflip is 2.0; expected a share"),
        (["--lr", "0"], "lr is 0.0; expected a positive"),
        (["--epoch_size", "4", "--warmup_epochs", "5"], "leave no epoch between them"),
        (["--epoch_size", "3", "--scheduler", "constant"], "leave no epoch between them"),
        (["--beta1", "1"], "beta1 is 1.0; expected a number in [0, 1)"),
        (["--beta2", "1.5"], "beta2 is 1.5; expected a number in [0, 1)"),
        (["--image_resize", "1", "2", "3"], "image_resize is (1, 2, 3)"),
        (["--color_jitter", "0.4", "--auto_augment", "randaug-m9"], "exclude each other"),
        (["--model", "skanet_s", "--max_boxes", "3"], "max_boxes is a setting of detection, but the task is class"),
        (["--model", "retinanet_van_tiny", "--iou_crop", "false"], "iou_crop is a setting of ssdlite, but the model"),
        (["--model", "mask_rcnn_van_tiny", "--image_resize", "512"], "(the size of its images is img_scale)"),
        (["--model", "ssdlite_skanet_s", "--multi_scale", "480", "512"], "(the size of its images is image_resize)"),
        (["--corruptions", "fog", "frog"], "corruptions has 'frog'; expected all, common, or some of gaussian_noise"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
        (["--batch_sze", "3"], "did you mean 'batch_size'?"),
        (["--lr", ".nan"], "lr is nan; expected a finite number"),
        (["--ckpt_save_steps", "-1"], "ckpt_save_steps is -1; expected 0 or more"),
        (["--config", "none.yaml"], "No configuration file at"),
    ],
)
def test_a_bad_command_line_exits_with_a_message(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        parse_args(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.fault("ranges")
@pytest.mark.parametrize(
    "name, value, message",
    [
        # What float32 makes 0, infinite, or 1.
        ("lr", 1e-39, "lr is 1e-39; expected a number from 1.1755e-38 to 3.4028e+38: training computes in float32"),
        ("lr", 1e39, "training computes in float32"),
        ("min_lr", 1e-45, "expected 0, or a number from 1.1755e-38"),
        ("warmup_lr", 1e-40, "training computes in float32"),
        ("weight_decay", 1e-39, "training computes in float32"),
        ("weight_decay", 4e38, "training computes in float32"),
        ("decay_rate", 1e-39, "training computes in float32"),
        ("mixup", 1e300, "training computes in float32"),
        ("mean", (0.5, 0.5, 1e39), "training computes in float32"),
        ("std", (0.5, 1e-45, 0.5), "training computes in float32"),
        ("loss_scale", 1e-39, "expected a number in [5.96046448e-08, 16777216]"),
        ("loss_scale", 1e38, "expected a number in [5.96046448e-08, 16777216]"),
        ("clip_value", 1e-39, "expected at least 1e-06"),
        ("beta1", 0.99999999, "expected a number in [0, 1)"),
        ("beta2", 0.99999999, "expected a number in [0, 1)"),
        ("momentum", 0.99999999, "expected a number in [0, 1)"),
        ("label_smoothing", 0.99999999, "expected a number in [0, 1)"),
        ("ema_decay", 0.99999999, "expected a number in [0.5, 0.99999]"),
        ("scale", (1e-50, 1.0), "expected a number in (0, 1]"),
        ("seed", 2**32, "expected a number in [0, "),
        ("batch_size", 2**40, "training computes in 32 bits"),
        # Other toolboxes' units.
        ("crop_pct", 87.5, "87.5 % is 0.875"),
        ("drop_rate", 10.0, "10 % is 0.1"),
        ("drop_path_rate", 20.0, "20 % is 0.2"),
        ("label_smoothing", 10.0, "10 % is 0.1"),
        ("hflip", 50.0, "50 % is 0.5"),
        ("re_prob", 25.0, "25 % is 0.25"),
        ("scale", (8.0, 100.0), "8 % is 0.08"),
        ("re_scale", (2.0, 33.0), "2 % is 0.02"),
        ("max_damaged", 5.0, "5 % is 0.05"),
        ("mixup_switch_prob", 50.0, "50 % is 0.5"),
        ("color_jitter", (40.0,), "0.4 varies a factor from 0.6 to 1.4"),
        ("ema_decay", 0.0002, "MMPretrain's momentum 0.0002 is 0.9998"),
        ("beta2", 0.001, "expected the share of the old value that stays: 0.999, not 0.001"),
        ("warmup_lr", 0.1, "warmup_lr is 0.1, above lr (0.001)"),
        ("min_lr", 0.01, "min_lr is 0.01, above lr (0.001)"),
        ("decay_rate", 10.0, "expected a number in (0, 1]"),
        ("image_resize", (3, 224, 224), "without the number of channels"),
        ("image_resize", (100_000,), "expected a number in [1, 8192]"),
        ("num_classes", 0, "num_classes is 0; expected at least 1"),
        ("momentum", -0.1, "expected a number in [0, 1)"),
        ("val_interval", 0, "val_interval is 0; expected at least 1"),
    ],
)
def test_a_number_out_of_its_range(name, value, message):
    with pytest.raises(ConfigError) as error:
        Config(**{name: value})
    assert message in str(error.value) and str(error.value).startswith(f"{name} is ")


def test_numbers_at_the_ends_of_their_ranges():
    Config(loss_scale=2.0**-24, lr=1.0, warmup_lr=0.0, min_lr=0.0, momentum=0.0, weight_decay=0.0, clip_value=1e9)
    Config(loss_scale=2.0**24, ema_decay=0.99999, beta1=0.0, drop_rate=0.0, label_smoothing=0.0, seed=2**32 - 1)
    Config(ema_decay=0.5, crop_pct=1.0, hflip=1.0, scale=(1.0, 1.0), decay_rate=1.0, mean=(123.675, -1.0, 0.0))


def test_settings_say_themselves_what_may_change():
    may_change = settings_that("may_change")
    assert {"data_dir", "val_split", "log_interval", "resume", "keep_checkpoint_max", "val_raw"} <= may_change
    assert not {"lr", "seed", "model", "batch_size", "train_split", "ema_decay", "amp_level"} & may_change
    assert settings_that("first_start") >= {"ckpt_path", "pretrained"}


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    """In YAML and on the command line; of the options that are paths, all."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ("data_dir", "ckpt_path", "class_map", "ckpt_save_dir", "result_json")
    write(tmp_path, "".join(f"{name}: ~/{name}\n" for name in paths[:3]) + "model: ~/m\n")
    config = parse_args(["--config=~/recipe.yaml", "--ckpt_save_dir=~/ckpt_save_dir", "--result_json=~/result_json"])
    assert [getattr(config, name) for name in paths] == [str(tmp_path / name) for name in paths]
    more = {"result_csv", "details", "class_csv", "real_labels", "corruptions_dir", "corruptions_plot"}
    assert config.model == "~/m" and settings_that("path") == {*paths, *more}


@pytest.mark.fault("look-alike")
@pytest.mark.parametrize(
    "text, lines",
    [("lr: 1\nema: true\nlr: 2\n", "1 and 3"), ("lr: 1\n'lr': 1\n", "1 and 2"), ("{lr: 1, lr: 2}", "1 and 1")],
)
def test_a_key_that_stands_twice(tmp_path, text, lines):
    with pytest.raises(ConfigError, match=f"recipe.yaml sets lr twice, in lines {lines}; keep one"):
        read_yaml(write(tmp_path, text))


def test_a_date_that_is_none_is_a_message(tmp_path, capsys):
    with pytest.raises(ConfigError, match="recipe.yaml is not plain YAML: month must be"):
        read_yaml(write(tmp_path, "lr: 2024-13-45"))
    with pytest.raises(SystemExit):
        parse_args(["--lr", "2024-13-45"])
    assert "month must be" in capsys.readouterr().err


def test_a_hint_where_the_type_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="clip_grad is 5.0; expected bool .its number is clip_value."):
        read_yaml(write(tmp_path, "clip_grad: 5.0"))


def test_every_option_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in to_dict(Config()))


def test_differences_name_both_values():
    old, new = to_dict(Config()), to_dict(Config(lr=0.1, drop_rate=0.5))
    assert differences(old, new) == ["drop_rate: None -> 0.5", "lr: 0.001 -> 0.1"]
    names = [f"n{i}" for i in range(1000)]
    (line,) = differences({"class_names": names}, {"class_names": [*names[:500], "\x1b[31m", *names[501:]]})
    assert len(line) < 300 and line.startswith("class_names: ['n500', ") and "\\x1b[31m" in line
    assert line.endswith("(of 1000 and 1000, from number 501 on)")


@pytest.mark.parametrize(
    "configured, record, message",
    [
        (None, {"num_classes": 1000}, "has 1000 classes and its checkpoint does not say which, the data has 2"),
        (1000, {}, "has 1000 classes and its checkpoint does not say which, the data has 2"),
        (1000, {"num_classes": 2}, "has 2 classes, but num_classes is 1000"),
        (1000, {"num_classes": 2, "class_names": ["a", "b"]}, "has 2 classes, but num_classes is 1000"),
        (None, {"num_classes": 3, "class_names": ["a", "b", "c"]}, r"missing in the data: \['c'\]"),
    ],
)
def test_data_of_other_classes_than_the_weights(configured, record, message):
    with pytest.raises(ConfigError, match=message):
        builders.evaluated_classes(Config(num_classes=configured), record, ["a", "b"])


def test_names_that_look_alike_are_told_apart():
    """Of a class folder that macOS has written the other way."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    with pytest.raises(ConfigError, match=r"'cafe\\u0301' and 'caf\\xe9', Unicode's NFC and NFD.: rename"):
        builders.evaluated_classes(Config(), {"num_classes": 2, "class_names": [composed, "tea"]}, [decomposed, "tea"])


def test_the_number_of_classes_that_is_evaluated():
    names = ["a", "b"]
    for record in ({}, {"num_classes": 2}, {"num_classes": 2, "class_names": names}, {"num_classes": None}):
        for configured in (None, 2):
            assert builders.evaluated_classes(Config(num_classes=configured), record, names) == 2
    wider = {"num_classes": 1000, "class_names": names}  # trained on these two by a recipe for a thousand
    assert builders.evaluated_classes(Config(num_classes=1000), wider, names) == 1000
