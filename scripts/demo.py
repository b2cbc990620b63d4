"""Shows a page: drop an image, see its classes: `mindska demo`, from a clone.

    python scripts/demo.py --ckpt_path skanet_s.ckpt

`--help` says more; the command is mindska/commands/demo.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("demo")
