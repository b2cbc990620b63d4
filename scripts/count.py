"""Prints parameters and multiply-accumulates of the models: `mindska count`, from a clone.

    python scripts/count.py [MODEL ...] [--image_resize N]

`--help` says more; the command is mindska/commands/count.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("count")
