"""The README's figures are those that the repository's commands print."""

import json
import re

import pytest
from commands import ROOT
from mindcv.models.registry import get_pretrained_cfg

from mindska.benchmark.count import count
from mindska.models.factory import OUR_MODELS

README = (ROOT / "README.md").read_text()
MODELS = (ROOT / "docs" / "models.md").read_text()
FAULTS = (ROOT / "docs" / "faults.md").read_text()


def test_every_model_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", MODELS, re.M)) == set(OUR_MODELS)


QUICK = ("skanet_nano", "van_tiny", "sk_resnet18")  # one a family; the others are slow


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in sorted(OUR_MODELS)]
)
def test_counts(name):
    size = get_pretrained_cfg(name)["input_size"][1]
    parameters, layers, distances = count(name, size, size)
    assert f"| `{name}` | {parameters:,} | {layers / 1e9:.4f} | {size} |" in MODELS
    assert not distances or name == "skanet_nano" or f"{distances / 1e9:.4f} G" in MODELS


def test_counts_are_the_originals():
    counts = json.loads((ROOT / "tests" / "parity" / "goldens" / "counts.json").read_text())
    for name in ("van_base_lska_k53", "van_tiny_lska_k7", "sknet50", "sknet101", "sk_resnet34"):
        expected = counts[re.sub(r"(van_\w+)_lska", r"lska_\1", name).replace("sk_", "sk")]
        assert f"| `{name}` | {expected['params']:,} | {expected['macs'] / 1e9:.4f} | 224 |" in MODELS


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_every_file_that_is_named_exists(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"\b((?:scripts|configs|tests|mindska|docs)/[\w/.-]+\.\w+)", text)
    assert named and not [path for path in named if not (ROOT / path).exists()]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not ((ROOT / page).parent / link).exists()]


def test_every_fault_has_a_row_and_a_test():
    report = (ROOT / "tests" / "faults" / "report.py").read_text()
    keys = re.findall(r'^    "([\w-]+)": \(', report, re.M)
    marked = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for mark in re.findall(r"^@pytest.mark.fault\((.*)\)", path.read_text(), re.M):
            marked |= set(re.findall(r'"([\w-]+)"', mark))
    assert marked == set(keys)
    table = FAULTS[FAULTS.index("<!-- faults -->") : FAULTS.index("<!-- /faults -->")]
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", table, re.M)] == list(range(1, len(keys) + 1))
