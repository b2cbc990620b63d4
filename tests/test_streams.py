"""Standard streams that are closed, full or without a reader; the runs are in faults/test_stopped.py."""

import contextlib
import io
import subprocess
import sys

import pytest
from commands import ROOT
from tqdm import tqdm

from mindska.streams import Unfailing, drop_what_stderr_refuses, print_result, unfailing_stderr


@pytest.fixture
def full():
    file = open("/dev/full", "w")  # noqa: SIM115, PTH123
    yield file
    with contextlib.suppress(OSError):
        file.close()


def test_what_a_stream_refuses_is_dropped(full, monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (full, closed, io.TextIOWrapper(io.BytesIO(), "ascii")):
        unfailing = Unfailing(stream)
        print("a message ü", file=unfailing, flush=True)
        assert unfailing.failed
    monkeypatch.setattr(sys, "stderr", full)
    bar = tqdm(range(3), file=unfailing_stderr(), mininterval=0)
    assert list(bar) == [0, 1, 2]


def test_a_bar_of_a_command_is_on_the_stream_of_its_messages(monkeypatch):
    """tqdm takes a bar away while a message is printed where it finds the bar's stream among the standard ones."""
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        drop_what_stderr_refuses()
        drop_what_stderr_refuses()
        bar = tqdm(range(3), file=unfailing_stderr())
        assert bar.fp == sys.stderr and not isinstance(sys.stderr.stream, Unfailing)


def test_a_result_that_cannot_be_printed_is_not_lost_without_a_word(full, monkeypatch, capsys):
    assert print_result("top-1") == "" and capsys.readouterr().out == "top-1\n"
    monkeypatch.setattr(sys, "stdout", full)
    assert "No space left" in print_result("top-1")
    text = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", text)
    assert print_result("ü\udcff") == "" and text.buffer.getvalue() == b"\\xfc\\udcff\n"


PROGRAM = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("streams", {path!r})
streams = importlib.util.module_from_spec(spec)
spec.loader.exec_module(streams)
streams.fill_standard_descriptors()
with open({out!r}, "w") as file:
    print(file.fileno() > 2, os.get_inheritable(2), file=file)
print("out"), print("err", file=sys.stderr), os.write(2, b"a library's message")
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_number_of_a_closed_stream(tmp_path, closed):
    out = tmp_path / "out"
    program = PROGRAM.format(path=str(ROOT / "mindska" / "streams.py"), out=str(out))
    done = subprocess.run(["bash", "-c", f'exec "$@" {closed}', "-", sys.executable, "-c", program], check=True)
    assert done.returncode == 0 and out.read_text() == "True True\n"
