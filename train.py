"""Trains a model by a recipe, on one device or many: `mindska train`, from a clone.

    python train.py --config configs/skanet_nano_digits.yaml --data_dir DATA
    mpirun -n 8 --bind-to none python train.py --config configs/skanet_s.yaml --data_dir DATA
    msrun --worker_num=8 --local_worker_num=8 --join=True train.py --config configs/skanet_s.yaml --data_dir DATA

The recipe to read from top to bottom is mindska/commands/train.py.
"""

from mindska.commands.train import main

if __name__ == "__main__":
    main(description=__doc__)
