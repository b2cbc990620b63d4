"""The rules of docs/design.md that a program can check: which package imports which, and how long a file may be."""

import ast
import re
import subprocess
import sys

import pytest
from commands import ROOT

PACKAGE = ROOT / "mindska"
GROUND = {"errors", "files", "modes", "streams", "waiting"}  # which all may import
# Package or module -> what else of mindska it may import. docs/design.md has the same table.
MAY_IMPORT = {
    "errors": set(),
    "streams": set(),
    "files": set(),
    "waiting": set(),
    "modes": set(),
    "arguments": set(),
    "names": {"arguments"},
    "device_support": set(),
    "recipes": {"arguments"},
    "mindcv_recipes": set(),
    "config": {"arguments", "names", "recipes", "mindcv_recipes", "device_support"},
    "distributed": set(),
    "models": set(),
    "data": {"distributed"},
    "detection": {"models", "data", "distributed", "segmentation", "evaluation", "dense_evaluation"},
    "kernels": {"distributed"},
    "acceleration": {"models", "kernels"},
    "folding": {"models", "acceleration"},
    "segmentation": {"models", "data", "distributed", "evaluation", "dense_evaluation"},
    "weights": {"models", "data", "kernels", "segmentation", "detection"},
    "reference": {
        "weights", "detection", "models", "config", "distributed", "data", "evaluation", "builders", "tasks",
        "training",
    },
    "compile_cache": {"distributed", "kernels"},
    "evaluation": {"data", "distributed", "compile_cache"},
    "dense_evaluation": {"data", "distributed", "compile_cache"},
    "summary": {"models", "acceleration"},
    "training": {
        "models", "data", "kernels", "weights", "config", "distributed", "compile_cache", "evaluation", "summary",
        "names",
    },
    "exported": {"weights"},
    "verification": {"models", "exported"},
    "onnx_graph": {"models", "acceleration"},
    "onnx_segmentation": {"models", "segmentation", "onnx_graph"},
    "onnx_detection": {"detection", "onnx_graph", "onnx_segmentation"},
    "export": {
        "models", "acceleration", "weights", "exported", "verification", "onnx_graph", "onnx_segmentation",
        "onnx_detection",
    },
    "quantization": {"data", "weights", "evaluation", "export", "exported"},
    "prediction": {"data", "weights", "compile_cache", "export"},
    "validation": {
        "config", "distributed", "data", "weights", "compile_cache", "evaluation", "prediction", "builders",
    },
    "demo": {"data", "prediction"},
    "comparison": {"config", "training"},
    "builders": {
        "models", "data", "kernels", "acceleration", "weights", "config", "distributed", "training", "names",
        "device_support", "segmentation",
    },
    "tasks": {
        "config", "names", "distributed", "data", "weights", "evaluation", "builders", "segmentation", "detection",
        "validation", "export", "prediction", "dense_evaluation",
    },
    "analysis": {
        "config", "names", "distributed", "models", "acceleration", "data", "compile_cache", "evaluation",
        "prediction", "validation", "builders", "segmentation", "detection", "tasks",
    },
    "benchmark": {
        "models", "data", "kernels", "folding", "config", "distributed", "compile_cache", "training", "builders",
        "summary", "names", "weights", "export", "reference",
    },
}  # fmt: skip


def imported(path) -> set[str]:
    """The packages and modules of mindska that a file imports."""
    here = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = here[: len(here) - node.level] if node.level else ()
            base = [*package, *(node.module.split(".") if node.module else [])]
            names = [[*base, alias.name] for alias in node.names]
        found |= {name[1] for name in names if name[0] == "mindska" and len(name) > 1}
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package):
    one = PACKAGE / f"{package}.py"
    files = [one] if one.exists() else sorted((PACKAGE / package).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) <= MAY_IMPORT[package] | GROUND | {package, "__init__"}, path


def test_every_package_is_in_the_table():
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    # Commands import anything, and nothing imports them.
    assert names - {"__init__", "__main__", "commands"} == set(MAY_IMPORT)


def test_the_table_has_no_circle():
    left = dict(MAY_IMPORT)
    while left:
        free = [name for name, others in left.items() if not others & set(left)]
        assert free, f"these import each other in a circle: {sorted(left)}"
        for name in free:
            del left[name]


def test_the_design_has_the_same_table():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    assert {name: set(re.findall(r"`(\w+)`", others)) for name, others in rows.items()} == MAY_IMPORT


def test_files_are_short():
    """A model file can be read at once; a command's logic lies in the package; the two main ones read from top to
    bottom, and what a clone has beside them only calls them."""
    limits = [
        *((path, 250) for path in (PACKAGE / "models").rglob("*.py")),
        *((path, 130) for path in (PACKAGE / "commands").glob("*.py")),
        *((path, 15) for path in (*(ROOT / "scripts").glob("*.py"), ROOT / "train.py", ROOT / "validate.py")),
        (PACKAGE / "commands" / "train.py", 90),
        (PACKAGE / "commands" / "validate.py", 70),
    ]
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path, _ in limits}
    assert not [
        f"{p.relative_to(ROOT)}: {lengths[p.relative_to(ROOT)]} lines of {n}"
        for p, n in limits
        if lengths[p.relative_to(ROOT)] > n
    ]


@pytest.mark.fault("first-import")
@pytest.mark.slow
def test_each_module_may_be_imported_first(tmp_path):
    """In whatever order: the models' registration must not need a module that needs the models."""
    program = ROOT / "tests" / "programs" / "first_imports.py"
    done = subprocess.run([sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=600)
    *failed, last = done.stdout.splitlines()
    assert not failed and int(last.split()[0]) > 200, done.stdout + done.stderr[-2000:]
