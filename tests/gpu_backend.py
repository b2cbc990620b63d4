"""Whether MindSpore's GPU backend takes every recipe: evaluation, a training step, and a step from the data queue.

    python tests/gpu_backend.py               all recipes, on a stand-in for a GPU that any Linux machine can make
    python tests/gpu_backend.py --recipes sknet50 --what train

The stand-in (tests/programs/stand_in_gpu) computes nothing: the graphs compile, a kernel is found for every operator in
the recipe's precision, and all are launched. It takes about half an hour on two cores and is not part of the default
test run. On a machine with a GPU, `--real` uses it. docs/platforms.md has the table.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "programs"))

import stand_in_gpu  # noqa: E402
import yaml  # noqa: E402

CONFIGS = HERE.parent / "configs"
WHAT = ("forward", "train", "sink")


def reason(output: str) -> str:
    """What MindSpore says, in one line."""
    errors = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception)): (.*)", output, re.MULTILINE)
    words = f"{errors[-1][0]}: {errors[-1][1]}" if errors else (output.strip().splitlines() or ["no word"])[-1]
    return words[:200].replace("|", "/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "\nmodel:" in path.read_text())
    parser.add_argument("--recipes", nargs="+", default=names, choices=names, metavar="NAME", help="default: all")
    parser.add_argument("--what", nargs="+", default=WHAT, choices=WHAT, help="default: all")
    parser.add_argument("--folder", type=Path, help="where to keep the stand-in; default: a temporary folder")
    parser.add_argument("--real", action="store_true", help="use this machine's GPU")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        environment = dict(os.environ)
        if not options.real:
            folder = options.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            stand_in_gpu.make(folder.resolve())
            environment = stand_in_gpu.environment(folder.resolve())
        environment["DEVICE"] = "GPU"
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(HERE.parent)]))
        print("| recipe | model | precision | " + " | ".join(options.what) + " |")
        print("|---" * (3 + len(options.what)) + "|", flush=True)
        failed = 0
        for name in options.recipes:
            recipe = CONFIGS / f"{name}.yaml"
            settings = yaml.safe_load(recipe.read_text())
            cells = [name, settings["model"], settings.get("amp_level", "O0")]
            for what in options.what:
                start = time.time()
                words = [sys.executable, str(HERE / "programs" / "recipe_step.py"), str(recipe), what]
                done = subprocess.run(
                    words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
                good = done.returncode == 0 and done.stdout.rstrip().endswith("launched")
                failed += not good
                cells.append(f"{time.time() - start:.0f} s" if good else f"**fails**: {reason(done.stdout)}")
            print(f"| {' | '.join(cells)} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
