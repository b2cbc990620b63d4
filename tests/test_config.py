"""Configuration: types, unknown keys, command line over YAML, the recipes in configs/."""

from pathlib import Path

import pytest

from mindska import recipe
from mindska.config import Config, ConfigError, differences, parse_args, read_yaml, to_dict

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
    assert recipe.stem in config.ckpt_save_dir
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


def test_every_option_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in to_dict(Config()))


def test_differences_name_both_values():
    old, new = to_dict(Config()), to_dict(Config(lr=0.1, model="skanet_nano"))
    assert differences(old, new) == ["lr: 0.001 -> 0.1", "model: '' -> 'skanet_nano'"]


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
        recipe.evaluated_classes(Config(num_classes=configured), record, ["a", "b"])


def test_the_number_of_classes_that_is_evaluated():
    names = ["a", "b"]
    for record in ({}, {"num_classes": 2}, {"num_classes": 2, "class_names": names}, {"num_classes": None}):
        for configured in (None, 2):
            assert recipe.evaluated_classes(Config(num_classes=configured), record, names) == 2
    wider = {"num_classes": 1000, "class_names": names}  # trained on these two by a recipe for a thousand
    assert recipe.evaluated_classes(Config(num_classes=1000), wider, names) == 1000
