"""Writes scikit-learn's handwritten digits as scenes: `mindska prepare_digit_scenes`, from a clone.

    python scripts/prepare_digit_scenes.py data/digit_scenes

`--help` says more; the command is mindska/commands/prepare_digit_scenes.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("prepare_digit_scenes")
