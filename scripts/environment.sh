# To be sourced: the project's virtual environment in .venv, installed when it is missing or the project has changed.

# whole_venv: whether .venv can be used. `python -m venv` writes `activate` last, after pip.
whole_venv() {
    [ -f .venv/bin/activate ] && .venv/bin/python -c 'import pip' 2>/dev/null
}

# make_venv: makes .venv; what an earlier try or Ctrl-C left half-made is made anew, and nothing else is touched.
make_venv() {
    local python="${PYTHON:-python3}" found
    if [ -f .venv/bin/activate ] && .venv/bin/python -c '' 2>/dev/null; then  # made by another tool, say uv
        .venv/bin/python -m ensurepip >/dev/null 2>&1 && whole_venv && return
        echo ".venv is an environment without pip. Install pip there, or move .venv away, and run this again." >&2
        return 1
    fi
    if ! command -v "$python" >/dev/null; then
        echo "There is no Python called '$python'. Install Python 3.9 to 3.12, or set PYTHON to one of them." >&2
        return 1
    fi
    if ! "$python" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))'; then
        found="$("$python" --version 2>&1)" || true
        echo "MindSpore needs Python 3.9 to 3.12; '$python' is ${found:-none}. Set PYTHON to one of them." >&2
        return 1
    fi
    if [ -e .venv ] || [ -L .venv ]; then
        if [ ! -d .venv ] || { [ -n "$(ls -A .venv)" ] && [ ! -f .venv/pyvenv.cfg ]; }; then
            echo ".venv is there, and is no virtual environment of Python's. Move it away, and run this again." >&2
            return 1
        fi
        echo ".venv is only half made, or its Python is gone: it is made anew."
    fi
    if ! "$python" -m venv --clear .venv || ! whole_venv; then
        echo "'$python -m venv .venv' failed. On Debian and Ubuntu the package python3-venv is needed" \
            "(apt install python3-venv; of another Python, for example python3.11-venv). Then run this again." >&2
        return 1
    fi
}

# install_into_venv WHAT: activates .venv with the package and WHAT (".[test]", ...) installed.
install_into_venv() {
    whole_venv || make_venv || return 1
    # shellcheck disable=SC1091
    source .venv/bin/activate
    local stamp=".venv/installed-$(echo "$1" | tr -dc '[:alnum:]')"
    if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
        echo "Installing mindska and what it needs into .venv (once; a few minutes) ..."
        if ! python -m pip install --quiet --editable "$1"; then
            echo "pip could not install all that is needed (see above). Run this again: what is there stays." >&2
            return 1
        fi
        touch "$stamp"
    fi
    # mpirun refuses to run as root (in a container, say) unless told.
    if [ "$(id -u)" = 0 ]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
}
