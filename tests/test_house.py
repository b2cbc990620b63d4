"""The house rules of docs/design.md that a program can read: which room imports which, and how long a file may be."""

import ast

import pytest
from commands import ROOT

PACKAGE = ROOT / "mindska"
# Rooms that a room must not import, whatever stands between them.
FORBIDDEN = {
    "models": {"kernels", "acceleration", "folding", "training", "data", "weights", "distributed"},
    "kernels": {"models", "acceleration", "folding", "training", "data", "weights"},
    "acceleration": {"folding", "training", "data", "weights", "export"},
    "data": {"models", "kernels", "acceleration", "training", "weights"},
    "reference": {"kernels", "acceleration", "training", "data"},
    "distributed": {"models", "kernels", "acceleration", "training", "data", "weights", "config"},
    "config": {"models", "kernels", "acceleration", "training", "data", "weights", "distributed"},
}


def imported(path) -> set[str]:
    """The rooms of the house that a file imports."""
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


@pytest.mark.parametrize("room", FORBIDDEN)
def test_arrows_run_one_way(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & FORBIDDEN[room], path


def test_files_are_short():
    """A model file can be read at once; a script's logic lies in the package; both commands read from top to bottom."""
    limits = [
        *((path, 250) for path in (PACKAGE / "models").rglob("*.py")),
        *((path, 130) for path in (ROOT / "scripts").glob("*.py")),
        (ROOT / "train.py", 80),
        (ROOT / "validate.py", 60),
    ]
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path, _ in limits}
    assert not [
        f"{p.relative_to(ROOT)}: {lengths[p.relative_to(ROOT)]} lines of {n}"
        for p, n in limits
        if lengths[p.relative_to(ROOT)] > n
    ]
