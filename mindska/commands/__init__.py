"""The console command `mindska COMMAND ...`: a module here for each command, which it loads when it is asked for.

train.py, validate.py and scripts/ of a clone run the same modules.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple, Optional

from .. import __version__
from ..arguments import Parser, called, nearest
from ..errors import end_with_the_reader


class Command(NamedTuple):
    """A row of the table of commands.

    Attributes:
        help: what it does, in one line.
        lists: it prints something to read, and ends quietly when nobody reads on.
    """

    help: str
    lists: bool = False


COMMANDS = {
    "train": Command("train a model by a recipe, on one device or many"),
    "validate": Command("evaluate weights on a validation set"),
    "predict": Command("tell the classes of images", lists=True),
    "demo": Command("show a page: drop an image, see its classes"),
    "export": Command("write a network as ONNX or MindIR"),
    "convert": Command("convert weights between PyTorch, safetensors, Caffe and MindSpore"),
    "inspect": Command("show what is in a file of weights", lists=True),
    "average": Command("average the weights of several checkpoints"),
    "clean": Command("reduce a training checkpoint to its weights and record"),
    "check_data": Command("look through a data set before it is trained on"),
    "train_reference": Command("train the PyTorch reference by a recipe, to compare accuracies"),
    "compare": Command("compare runs: curves, figures and settings that differ", lists=True),
    "analyze": Command("look inside networks: attention, class activation, receptive fields, mistakes"),
    "lr_find": Command("try which learning rate a recipe should have"),
    "recipes": Command("list the recipes that --config finds by name", lists=True),
    "count": Command("print parameters and multiply-accumulates of the models", lists=True),
    "benchmark": Command("measure speed and memory on this machine"),
    "prepare_digits": Command("write scikit-learn's handwritten digits as folders of images"),
    "prepare_digit_scenes": Command("write scenes of these digits, for segmentation and detection"),
}


def run(name: str, arguments: Optional[Sequence[str]] = None) -> None:
    """Runs one command, with the words after its name (default: the process's)."""
    if COMMANDS[name].lists:
        end_with_the_reader()
    importlib.import_module(f"{__name__}.{name}").main(arguments)


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    return f"commands:\n{rows}\n\n`mindska COMMAND --help` shows the options of a command."


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Runs the command that the first word names.

    Exits with status 2 and a message when there is no such command.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(
        prog="mindska",
        usage="%(prog)s COMMAND ...",
        description="Trains, evaluates and exports SkaNet, VAN with large (separable) kernels and SKNet on MindSpore.",
        epilog=_help(),
    )
    parser.add_argument("--version", action="version", version=f"mindska {__version__}")
    if words and words[0] in COMMANDS:
        with called(f"mindska {words[0]}"):
            run(words[0], words[1:])
        return
    if not words:
        parser.print_help()
        return
    if words[0] == "help":  # `mindska help train`
        main([*words[1:], "--help"])
        return
    if not words[0].startswith("-"):
        meant = nearest(words[0], COMMANDS) or f"; expected one of {', '.join(COMMANDS)}"
        parser.error(f"unknown command {words[0]!r}{meant}")
    parser.parse_args(words)  # --help, --version; anything else is an error
