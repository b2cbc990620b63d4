"""Reduces a training checkpoint to weights and record: `mindska clean`, from a clone.

    python scripts/clean_checkpoint.py run/skanet_s_best.ckpt

`--help` says more; the command is mindska/commands/clean.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("clean")
