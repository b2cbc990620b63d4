"""scripts/environment.sh, which the quick start and the tests begin with: what stands in the way of an environment.

The Python that is found is a script of ours, whose `-m venv` does what is asked of it.
"""

import os
import shutil
import stat
import subprocess

import pytest
from commands import ROOT

PYTHON = """#!/bin/bash
echo "python $*" >>"$LOG"
case "$1" in
    -c) exit "${OTHER_VERSION:-0}" ;;
    --version) echo "Python 3.13.0"; exit ;;
esac
[ "$2" = venv ] || exit 9
[ "$3" = --clear ] && { rm -rf "$4"; shift; }
mkdir -p "$3/bin"
touch "$3/pyvenv.cfg"
case "$VENV" in
    no_ensurepip) echo "The virtual environment was not created successfully: ensurepip is not available"; exit 1 ;;
    interrupted) kill -INT $PPID; exit 130 ;;
    without_activate) exit 0 ;;
esac
printf '#!/bin/bash\\necho "own python $*" >>"$LOG"\\n[ "$2" != pip ] || exit "${PIP:-0}"\\n' >"$3/bin/python"
chmod +x "$3/bin/python"
echo "PATH='$PWD/$3/bin':\\$PATH" >"$3/bin/activate"
"""


@pytest.fixture
def project(tmp_path):
    """A project with our scripts, and a `python3` before all others."""
    shutil.copytree(ROOT / "scripts", tmp_path / "my project" / "scripts")
    (tmp_path / "my project" / "pyproject.toml").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(PYTHON)
    (tmp_path / "bin" / "python3").chmod(stat.S_IRWXU)

    class Project:
        folder, venv, log = tmp_path / "my project", tmp_path / "my project" / ".venv", tmp_path / "log"

        def prepare(self, **variables):
            """What scripts/quickstart.sh begins with: its exit status and what it says."""
            self.log.write_text("")
            environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "LOG": str(self.log), **variables}
            environment.pop("PYTHON", None) if "PYTHON" not in variables else None
            program = 'set -euo pipefail; source scripts/environment.sh; install_into_venv ".[test]"; echo ready'
            done = subprocess.run(
                ["bash", "-c", program], cwd=self.folder, env=environment, capture_output=True, text=True
            )
            return done.returncode, done.stdout + done.stderr

    return Project()


@pytest.mark.parametrize("fails", ["no_ensurepip", "interrupted", "without_activate"])
def test_an_environment_that_was_half_made_is_made_anew(project, fails):
    status, said = project.prepare(VENV=fails)
    assert status != 0 and "ready" not in said and "activate" not in said
    if fails != "interrupted":
        assert "apt install python3-venv" in said
    status, said = project.prepare(VENV="whole")
    assert status == 0 and said.endswith("ready\n") and "half made" in said
    # And from then on it is taken as it is.
    status, said = project.prepare(VENV=fails)
    assert (status, said) == (0, "ready\n") and "venv" not in project.log.read_text()


def test_an_installation_that_was_interrupted_goes_on(project):
    status, said = project.prepare(VENV="whole", PIP="1")
    assert status == 1 and "pip could not install all that is needed" in said
    assert project.prepare(VENV="whole")[0] == 0
    assert "own python -m pip install --quiet --editable .[test]" in project.log.read_text()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"PYTHON": "nosuch"}, "There is no Python called 'nosuch'"),
        ({"PYTHON": "/nowhere/python3"}, "There is no Python called '/nowhere/python3'"),
        ({"PYTHON": ""}, None),  # as if it were not set
        ({"OTHER_VERSION": "1"}, "'python3' is Python 3.13.0. Set PYTHON"),
    ],
)
def test_the_python_that_is_asked_for(project, variables, message):
    status, said = project.prepare(VENV="whole", **variables)
    if message is None:
        assert status == 0
        return
    assert status == 1 and message in said and not project.venv.exists()


def test_nothing_of_others_is_removed(project):
    """A folder that is no environment, and an environment of another tool, which has no pip."""
    project.venv.mkdir()
    (project.venv / "thesis.txt").write_text("mine")
    status, said = project.prepare(VENV="whole")
    assert status == 1 and "Move it away" in said and (project.venv / "thesis.txt").read_text() == "mine"
    (project.venv / "pyvenv.cfg").touch()
    (project.venv / "bin").mkdir()
    (project.venv / "bin" / "activate").touch()
    (project.venv / "bin" / "python").write_text('#!/bin/bash\n[ "$2" != "import pip" ] && [ "$2" != ensurepip ]\n')
    (project.venv / "bin" / "python").chmod(stat.S_IRWXU)
    status, said = project.prepare(VENV="whole")
    assert status == 1 and "an environment without pip" in said and (project.venv / "thesis.txt").exists()


def test_what_msrun_leaves_is_not_committed():
    """Its logs lie where it was started."""
    names = ["worker_0.log", "scheduler.log", "rank_0/om/analyze_fail.ir", "kernel_meta/x"]
    ignored = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    if "not a git repository" in ignored.stderr:
        pytest.skip("this is no clone")
    assert ignored.stdout.split() == names
