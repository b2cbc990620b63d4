"""Tells the classes of images: `mindska predict`, from a clone.

    python scripts/predict.py photos/ --ckpt_path skanet_s.ckpt

`--help` says more; the command is mindska/commands/predict.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("predict")
