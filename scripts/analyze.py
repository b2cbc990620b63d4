"""Looks inside networks: `mindska analyze`, from a clone.

    python scripts/analyze.py cam --ckpt_path skanet_s.ckpt --data_dir DATA

`--help` says more; the command is mindska/commands/analyze.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("analyze")
