"""Looks through a data set before it is trained on: `mindska check_data`, from a clone.

    python scripts/check_data.py --data_dir DATA

`--help` says more; the command is mindska/commands/check_data.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("check_data")
