"""The README's figures are those that the repository's commands print."""

import importlib.util
import re
from pathlib import Path

import mindcv
import pytest
from mindcv.models.registry import get_pretrained_cfg

from mindska.models.factory import OUR_MODELS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_model_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.M)) == set(OUR_MODELS)


@pytest.mark.parametrize("name", sorted(OUR_MODELS))
def test_counts(name):
    spec = importlib.util.spec_from_file_location("count", ROOT / "scripts" / "count.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    size = get_pretrained_cfg(name)["input_size"][1]
    parameters, layers, distances = script.count(mindcv.create_model(name), size, size)
    assert f"| `{name}` | {parameters:,} | {layers / 1e9:.4f} | {distances / 1e9:.4f} | {size} |" in README


def test_every_file_that_is_named_exists():
    named = re.findall(r"\b((?:scripts|configs|tests|mindska)/[\w/.-]+\.\w+)", README)
    assert named and all((ROOT / path).exists() for path in named), named
