"""Graphs kept from one process to the next: faster, the same figures, and never the wrong one."""

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext

import mindspore as ms
import numpy as np
import pytest
from commands import ROOT
from mindspore import Tensor, nn, ops
from mindspore.train.mind_ir_pb2 import GraphProto, ModelProto

from mindska import compile_cache, kernels

PROGRAM = ROOT / "tests" / "programs" / "cached.py"
GRAPH = ModelProto(graph=GraphProto(name="a graph")).SerializeToString()


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


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.slow
def test_the_second_start_takes_the_graph_of_the_first(run, tmp_path, kernels):
    """Of an accelerated network and of a plain one, whose cells print objects with their addresses."""
    first, kept = run(MINDSKA_KERNELS=kernels)
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
    assert [record.getMessage().count("File exists") for record in caplog.records] == [1]


def test_what_killed_processes_left_is_deleted(tmp_path):
    now, old = time.time(), time.time() - 2 * 24 * 3600
    for name, when in ((".killed", old), (".compiling", now), ("kept-0of1", old)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (when, when))
    compile_cache._prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".compiling", "kept-0of1"]


@pytest.fixture
def kept(tmp_path):
    """A graph's folder as it is kept."""
    place = tmp_path / "place"
    (place / "rank_0").mkdir(parents=True)
    for name, content in (("rank_0/graph.mindir", GRAPH), ("rank_0/dependency.hash", b"0")):
        (place / name).write_bytes(content)
        (place / name).chmod(0o400)  # MindSpore's
    (tmp_path / "graphs").mkdir()
    folder = tmp_path / "graphs" / "0123-0of1"
    compile_cache._keep(place, folder)
    return folder


def test_a_graph_that_is_kept_is_copied_whole(kept, tmp_path):
    (tmp_path / "copy").mkdir()
    assert compile_cache._take(kept, tmp_path / "copy")
    assert (tmp_path / "copy" / "rank_0" / "graph.mindir").read_bytes() == GRAPH
    assert not (tmp_path / "copy" / "checksum").exists()
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert not compile_cache._take(kept.with_name("none"), tmp_path / "copy")


def replaced_by_a_link(folder):
    folder.rename(folder.with_name("moved"))
    folder.symlink_to(folder.with_name("moved"))


DAMAGES = {
    "cut": lambda folder: os.truncate(folder / "rank_0" / "graph.mindir", 3),
    "changed": lambda folder: (folder / "rank_0" / "graph.mindir").write_bytes(b"A graph"),
    "less": lambda folder: (folder / "rank_0" / "dependency.hash").unlink(),
    "more": lambda folder: (folder / "rank_0" / "library.so").write_bytes(b"x"),
    "no checksum": lambda folder: (folder / "checksum").unlink(),
    "link inside": lambda folder: (folder / "rank_0" / "more.mindir").symlink_to("graph.mindir"),
    "link": replaced_by_a_link,
    "file": lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"x")),
    "file's mode": lambda folder: (folder / "rank_0" / "graph.mindir").chmod(0o666),
    "folder's mode": lambda folder: (folder / "rank_0").chmod(0o777),
    "owner": lambda folder: os.chown(folder / "rank_0" / "graph.mindir", 12345, -1),
}


@pytest.mark.fault("caches")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_graph_that_is_damaged_or_not_ours_is_deleted(kept, tmp_path, caplog, damage):
    if damage == "owner" and os.geteuid():
        pytest.skip("only root can give a file away")
    DAMAGES[damage](kept)
    (tmp_path / "copy").mkdir()
    assert not compile_cache._take(kept, tmp_path / "copy")
    assert not os.path.lexists(kept) and not list((tmp_path / "copy").iterdir())
    assert "the graph is compiled anew" in caplog.text and len(caplog.records) == 1


@pytest.mark.fault("caches")
def test_a_graph_under_the_name_of_another_is_deleted(kept, tmp_path, caplog):
    kept.rename(kept.with_name("4567-0of1"))
    (tmp_path / "copy").mkdir()
    assert not compile_cache._take(kept.with_name("4567-0of1"), tmp_path / "copy")
    assert "its checksum is wrong" in caplog.text


@pytest.fixture
def relu(graph, tmp_path, monkeypatch):
    """Compiles a cell of this process with a cache of its own."""
    monkeypatch.setenv("MINDSKA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINDSKA_KERNELS", "off")
    monkeypatch.setattr(compile_cache, "_taken", False)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    return nn.ReLU(), Tensor(np.float32([-1, 2])), tmp_path / "cache"


@pytest.mark.fault("caches")
@pytest.mark.parametrize("mode", [0o777, 0o775])
@pytest.mark.parametrize("place", ["", "graphs"])
def test_graphs_are_not_kept_where_others_can_write(relu, caplog, place, mode):
    cell, x, cache = relu
    (cache / "graphs").mkdir(parents=True)
    (cache / place).chmod(mode)
    compile_cache.compile_cached(cell, x)
    assert f"(mode {mode:o})" in caplog.text and not list((cache / "graphs").iterdir())
    assert cell(x).asnumpy().tolist() == [0, 2]


@pytest.mark.fault("cache-deleted")
def test_the_cache_may_be_deleted_while_a_graph_is_compiled(relu, monkeypatch, caplog):
    cell, x, cache = relu
    compiling = type(cell).compile

    def delete(cell, *inputs):
        compiling(cell, *inputs)
        if places[0].exists():  # it is called again later
            (places[0] / "graph.mindir").write_bytes(GRAPH)
            shutil.rmtree(cache)

    places = []
    monkeypatch.setattr(compile_cache, "_mindspores_cache", lambda place: places.append(place) or nullcontext())
    monkeypatch.setattr(nn.ReLU, "compile", delete, raising=False)
    compile_cache.compile_cached(cell, x)
    assert len(list((cache / "graphs").iterdir())) == 1  # kept all the same
    assert cell(x).asnumpy().tolist() == [0, 2]


@pytest.mark.fault("cache-deleted")
def test_libraries_that_are_deleted_while_a_graph_is_compiled_are_put_back(monkeypatch):
    calls = []

    class Cell:
        def compile(self):
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("couldn't find the AOT binary file")

    missing = iter((False, True))
    monkeypatch.setattr(compile_cache, "keep_libraries", lambda: next(missing))
    compile_cache._compile(Cell(), ())
    assert len(calls) == 2
    calls.clear()
    missing = iter((False, False))
    with pytest.raises(RuntimeError, match="AOT"):
        compile_cache._compile(Cell(), ())


@pytest.mark.slow
def test_a_damaged_graph_is_compiled_anew(run, tmp_path):
    first, kept = run()
    (graph,) = (tmp_path / "graphs").rglob("*.mindir")
    sound = graph.stat().st_size
    os.truncate(graph, sound // 2)
    assert run() == (first, kept)
    (graph,) = (tmp_path / "graphs").rglob("*.mindir")
    assert graph.stat().st_size == sound


class Scaled(nn.Cell):
    """A plain cell with one more attribute, whatever it is."""

    def __init__(self, factor=1.0, bias=None):
        super().__init__()
        self.dense = nn.Dense(2, 2)  # prints its initialisers, with their addresses
        self.relu, self.factor, self.bias = ops.ReLU(), factor, bias

    def construct(self, x):
        return self.relu(self.dense(x)) * self.factor


def scale_by(factor):
    def scale(x):
        return x * factor

    return scale


def doubled(x):
    return 2 * x


@pytest.mark.fault("caches")
def test_the_key_of_a_graph_is_what_its_network_computes():
    """Made anew, a network has the same key; one that differs in anything that counts has another."""
    x = Tensor(np.zeros((1, 2), np.float32))
    variants = [
        lambda: Scaled(), lambda: Scaled(2.0), lambda: Scaled(True), lambda: Scaled("2"), lambda: Scaled((1, 2)),
        lambda: Scaled({"b": 1, "a": 2}), lambda: Scaled({"b", "a"}), lambda: Scaled(np.float32(2)),
        lambda: Scaled(Tensor([1.0])), lambda: Scaled(Tensor([2.0])), lambda: Scaled(np.zeros(2)),
        lambda: Scaled(ops.ReduceMean()), lambda: Scaled(ops.ReduceMean(keep_dims=True)), lambda: Scaled(nn.GELU()),
        lambda: Scaled(scale_by(2)), lambda: Scaled(scale_by(3)), lambda: Scaled(np.tanh), lambda: Scaled(nn.Dense),
        lambda: Scaled(ms.jit(doubled)), lambda: Scaled(1.0, 2.0), lambda: Scaled(1.0).set_train(),
        lambda: nn.SequentialCell(Scaled()),
    ]  # fmt: skip
    keys = [[compile_cache._digest(make(), (x,), None) for _ in range(2)] for make in variants]
    assert all(first == second for first, second in keys)
    assert len({first for first, _ in keys}) == len(variants)
    assert not [fact for make in variants for fact in compile_cache._facts(make()) if " at 0x" in fact]


@pytest.mark.fault("caches")
def test_half_a_graph_is_not_kept(tmp_path, caplog):
    """As MindSpore leaves it on a full disk, without an error."""
    (tmp_path / "place").mkdir()
    for content in (GRAPH[:-1], b"", None):
        if content is not None:
            (tmp_path / "place" / "graph.mindir").write_bytes(content)
        else:
            (tmp_path / "place" / "graph.mindir").unlink()
        caplog.clear()
        compile_cache._keep(tmp_path / "place", tmp_path / "0123-0of1")
        assert not (tmp_path / "0123-0of1").exists()
        assert ["not written it whole" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.fault("caches")
def test_without_room_for_a_graph_mindspore_does_not_try(relu, tmp_path, monkeypatch, caplog):
    """It would print its own errors. A limit on the size of files stands for a full disk."""
    cell, x, cache = relu
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(compile_cache, "_mindspores_cache", lambda place: pytest.fail("it tries"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        compile_cache.compile_cached(cell, x)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Compiled graphs are not kept (no room for 64 MiB in" in said and "File too large" in said
    assert not list((cache / "graphs").iterdir()) and cell(x).asnumpy().tolist() == [0, 2]


@pytest.mark.fault("caches")
@pytest.mark.parametrize("umask, file, folder", [(0o077, 0o600, 0o700), (0o002, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_graphs_follow_the_umask_and_nobody_else_can_write_them(tmp_path, umask, file, folder):
    (tmp_path / "place" / "rank_0").mkdir(parents=True)
    (tmp_path / "place" / "rank_0" / "graph.mindir").write_bytes(GRAPH)
    (tmp_path / "graphs").mkdir()
    before = os.umask(umask)
    try:
        compile_cache._keep(tmp_path / "place", tmp_path / "graphs" / "0123-0of1")
    finally:
        os.umask(before)
    kept = list((tmp_path / "graphs").rglob("*"))
    assert len(kept) == 4
    assert {path.stat().st_mode & 0o777 for path in kept if path.is_file()} == {file}
    assert {path.stat().st_mode & 0o777 for path in kept if path.is_dir()} == {folder}
    (tmp_path / "copy").mkdir()
    assert compile_cache._take(tmp_path / "graphs" / "0123-0of1", tmp_path / "copy")


def test_a_graph_of_root_s_that_cannot_be_touched_is_taken(kept, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(compile_cache.os, "utime", refuse)
    (tmp_path / "copy").mkdir()
    assert compile_cache._take(kept, tmp_path / "copy") and not caplog.records
