"""Learning-rate range test: `mindska lr_find`, from a clone.

    python scripts/lr_find.py --config configs/skanet_nano_digits.yaml --data_dir DATA

`--help` says more; the command is mindska/commands/lr_find.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("lr_find")
