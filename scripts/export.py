"""Exports a network to MindIR or ONNX: `mindska export`, from a clone.

    python scripts/export.py --ckpt_path skanet_s.ckpt --format onnx --fold

`--help` says more; the command is mindska/commands/export.py.
"""

from mindska.commands import run

if __name__ == "__main__":
    run("export")
