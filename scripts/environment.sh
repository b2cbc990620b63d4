# To be sourced: the project's virtual environment in .venv, installed when it is missing or the project has changed.

# install_into_venv WHAT: activates .venv with the package and WHAT (".[test]", ...) installed.
install_into_venv() {
    local python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))'; then
        echo "MindSpore needs Python 3.9 to 3.12; found $("$python" --version). Set PYTHON to one of them." >&2
        return 1
    fi
    [ -d .venv ] || "$python" -m venv .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
    local stamp=".venv/installed-$(echo "$1" | tr -dc '[:alnum:]')"
    if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
        echo "Installing mindska and what it needs into .venv (once; a few minutes) ..."
        python -m pip install --quiet --editable "$1"
        touch "$stamp"
    fi
    # mpirun refuses to run as root (in a container, say) unless told.
    if [ "$(id -u)" = 0 ]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
}
