"""Trains the PyTorch reference of a model by a recipe: `mindska train_reference`, from a clone.

    python scripts/train_reference.py --config configs/skanet_nano_fashion_mnist.yaml --data_dir DATA --seeds 1 2 3

`--help` says more; the command is mindska/commands/train_reference.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("train_reference")
