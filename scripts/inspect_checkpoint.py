"""Shows what is in a file of weights: `mindska inspect`, from a clone.

    python scripts/inspect_checkpoint.py FILE [--keys]

`--help` says more; the command is mindska/commands/inspect.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("inspect")
