"""Averages the weights of several checkpoints: `mindska average`, from a clone.

    python scripts/average_checkpoints.py output/skanet_s/skanet_s-*_*.ckpt --to mean.ckpt

`--help` says more; the command is mindska/commands/average.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("average")
