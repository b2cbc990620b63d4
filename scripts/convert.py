"""Converts weights: `mindska convert`, from a clone.

    python scripts/convert.py --model skanet_s --from model_best.pth.tar --to skanet_s.ckpt

`--help` says more; the command is mindska/commands/convert.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("convert")
