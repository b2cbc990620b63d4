"""Runs a command as tiny.py does, with RANK in the command line replaced by the rank: each rank sees other folders."""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv = [word.replace("RANK", os.environ["OMPI_COMM_WORLD_RANK"]) for word in sys.argv]
    sys.path.insert(0, str(Path(__file__).parent))
    runpy.run_path(str(Path(__file__).with_name("tiny.py")), run_name="__main__")
