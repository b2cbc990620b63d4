"""Graphs kept from one process to the next: faster, the same figures, and never the wrong one."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import ROOT
from mindspore import Tensor, nn

from mindska import compile_cache, kernels

PROGRAM = ROOT / "tests" / "programs" / "cached.py"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the program; what it printed, and the names of the graphs that are kept then."""
    for library in kernels.libraries():  # building them again would take longer than all the rest
        shutil.copy(library, tmp_path)
    monkeypatch.setenv("MINDSKA_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def start(name="skanet_nano", size=64, options=None, others=(), **environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        words = [sys.executable, str(PROGRAM), json.dumps([name, size, options, others])]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert "not found" not in done.stderr.lower(), done.stderr
        return json.loads(done.stdout.splitlines()[-1]), {path.name for path in (tmp_path / "graphs").glob("*")}

    return start


def test_the_second_start_takes_the_graph_of_the_first(run, tmp_path):
    first, kept = run()
    assert len(kept) == 1 and not next(iter(kept)).startswith(".")
    (graph,) = (tmp_path / "graphs").rglob("*.mindir")
    before = graph.stat().st_mtime_ns
    assert run() == (first, kept)
    assert graph.stat().st_mtime_ns == before


@pytest.mark.slow
def test_another_input_option_or_network_is_another_graph(run):
    kept = run()[1]
    for changes in (dict(size=96), dict(options="other"), dict(MINDSKA_KERNELS="off")):
        now = run(**changes)[1]
        assert len(now) == len(kept) + 1, changes
        kept = now


@pytest.mark.slow
def test_later_graphs_of_a_process_are_not_mixed_up(run):
    first = run("skanet_nano", others=["van_tiny_lska_k7"])[0]
    assert run("skanet_nano", others=["van_tiny_lska_k7"])[0] == first  # with a cached first graph
    assert run("van_tiny_lska_k7")[0] != run("skanet_nano")[0] == first[:1]


@pytest.mark.slow
def test_a_program_without_a_file_has_no_cache(run, tmp_path):
    """MindSpore's cache asks for the main program's file."""
    words = [sys.executable, "-c", PROGRAM.read_text(), json.dumps(["skanet_nano", 64, None, []])]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == run()[0]


@pytest.mark.slow
def test_it_can_be_switched_off(run, tmp_path):
    assert run(MINDSKA_COMPILE_CACHE="off")[1] == set()
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(MINDSKA_COMPILE_CACHE="perhaps")
    assert "expected on or off" in error.value.stderr


def test_a_cache_that_cannot_be_written_is_said_once(graph, tmp_path, monkeypatch, caplog):
    """The graphs are compiled without it: it saves time, and nothing needs it."""

    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(compile_cache, "cache_folder", lambda: tmp_path / "file")
    monkeypatch.setattr(compile_cache, "_taken", False)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    x = Tensor(np.float32([-1, 2]))
    with caplog.at_level(logging.WARNING, "mindska"):
        for cell in (nn.ReLU(), nn.ReLU()):
            compile_cache.compile_cached(cell, x)
            assert cell(x).asnumpy().tolist() == [0, 2]
    assert [record.getMessage().count("Not a directory") for record in caplog.records] == [1]


def test_what_killed_processes_left_is_deleted(tmp_path):
    now, old = time.time(), time.time() - 2 * 24 * 3600
    for name, when in ((".killed", old), (".compiling", now), ("kept-0of1", old)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (when, when))
    compile_cache._prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".compiling", "kept-0of1"]
