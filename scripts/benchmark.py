"""Measures speed and memory on this machine: `mindska benchmark`, from a clone.

    python scripts/benchmark.py --models sknet50 --kernels both

`--help` says more; the command is mindska/commands/benchmark.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("benchmark")
