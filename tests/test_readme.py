"""The figures of the README and of the pages are those that the repository's commands print; what they name exists."""

import json
import re

import pytest
from commands import ROOT
from documented import PAGES
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


def test_the_readme_is_short_and_repeats_the_pages_figures():
    assert len(README.splitlines()) < 150
    pages = {
        name: (ROOT / "docs" / f"{name}.md").read_text()
        for name in ("models", "parity", "speed", "faults", "detection")
    }
    rows = README[README.index("## Results") : README.index("## Where things are")]
    models, everything = pages["models"], "\n".join(pages.values())
    for figure in re.findall(r"\b\d+\.\d+\b", rows):
        assert re.search(rf"\b{re.escape(figure)}\b", everything), figure
    for model, forward in re.findall(r"`(\w+)` (\d\.\d\d)", rows):
        assert re.search(rf"^\| `{model}`, .* (?:forward|train) .*\| {forward} \|", pages["speed"], re.M), model
    assert (
        f"all {len(OUR_MODELS)} models" in README and "1e-7 to 7e-7" in models and "65 kills in 15" in pages["faults"]
    )


@pytest.mark.slow
def test_the_readmes_python_runs():
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    names: dict = {}
    exec(block, names)
    assert names["logits"].shape == (1, 1000) and names["segmenter"].num_classes == 150
    maps = names["features"](names["ops"].ones((1, 3, 64, 64)))
    assert [each.shape[-1] for each in maps] == [16, 8, 4, 2] and names["detector"].num_classes == 80


def test_the_model_cards_have_the_tables_figures():
    for page in ("skanet", "van", "sknet", "sk_resnet"):
        card = (ROOT / "docs" / f"{page}.md").read_text()
        for model, parameters in re.findall(r"`(\w+)` \((\d+,\d+(?:,\d+)?)\b", card):
            assert f"| `{model}` | {parameters} |" in MODELS, model
        for accuracy in re.findall(r"\d\d\.\d+(?= %)", card):
            assert re.search(rf"\b{accuracy} %", MODELS), (page, accuracy)
        for licence in ("paper", "authors' code", "weights", "this port"):
            assert f"| {licence}" in card, (page, licence)


def test_every_page_is_in_the_navigation_and_every_guide_in_the_readme():
    assert set(PAGES) == {"README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))}
    linked = set(re.findall(r"\]\((docs/\w+\.md)", README))
    assert set(PAGES) - {"README.md", "docs/quickstart.md"} == linked


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"\b((?:scripts|configs|tests|mindska|docs)/[\w/.-]+\.\w+)", text)
    assert not [path for path in named if not (ROOT / path).exists()]
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
