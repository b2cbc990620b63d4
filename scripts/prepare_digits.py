"""Writes scikit-learn's handwritten digits as folders of images: `mindska prepare_digits`, from a clone.

    python scripts/prepare_digits.py data/digits

`--help` says more; the command is mindska/commands/prepare_digits.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("prepare_digits")
