#!/usr/bin/env bash
# Creates the environment with the test extra, checks style and types and runs the tests; arguments go to pytest.
#   bash scripts/test.sh                    everything
#   bash scripts/test.sh -m "not slow"      the quick ones
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install_into_venv ".[test]"
ruff check .
ruff format --check .
mypy
# PyTorch's threads spin while they wait, on cores that others need.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
# More processes than the two cores that it is made for: half of the time a test waits for the ranks that it started.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
