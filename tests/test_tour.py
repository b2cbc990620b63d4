"""docs/tour.ipynb runs from its first cell to its last, and computes what it shows."""

import json
import os
import sys

import pytest
from commands import ROOT

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def outputs(cell) -> str:
    return "".join(
        "".join(each.get("text", "")) + "".join(each.get("data", {}).get("text/plain", "")) for each in cell["outputs"]
    )


def test_the_notebook_shows_small_outputs_of_every_step():
    notebook = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))  # it was run in this order
    assert NOTEBOOK.stat().st_size < 50_000 and all(outputs(cell) for cell in code)
    assert str(ROOT) not in NOTEBOOK.read_text() and "/tmp" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shown = [outputs(cell) for cell in notebook.cells if cell.cell_type == "code"]
    client = nbclient.NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": tmp_path}})
    client.execute()
    ran = [outputs(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in notebook.metadata.language_info.version
    same = ("(2, 7)", "(1014, 15)", "'skanet_nano_best.ckpt'", "first/val/6", "(1, 96, 2, 2)", "7 classes", "True")
    for word in same:
        assert [word in each for each in shown] == [word in each for each in ran], word
        assert any(word in each for each in ran), word
    assert "of the largest" in ran[-2] and ran[-1] == "True"
