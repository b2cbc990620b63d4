"""Command lines: one parser for all commands, and the names that they have in common."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Optional

from .errors import let_rank_0_speak

# Names of earlier versions and of other toolboxes: understood everywhere, shown nowhere.
ALIASES = {
    "--input_size": "--image_resize",
    "--input-size": "--image_resize",
    "--img_size": "--image_resize",
    "--img-size": "--image_resize",
    "--batch": "--batch_size",
    "--batch-size": "--batch_size",
    "-b": "--batch_size",
    "--no-use_ema": "--use_ema=false",
    "--no_use_ema": "--use_ema=false",
}
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def nearest(word: str, known: Iterable[str], show: str = "{!r}", most: int = 1) -> str:
    """For the end of a message: which (at most `most`) of the known names were meant; empty where none."""
    close = difflib.get_close_matches(word, list(known), n=most)
    return f"; did you mean {' or '.join(show.format(name) for name in close)}?" if close else ""


_program: list[str] = []  # what the running command is called, where that is not the file that was started


@contextmanager
def called(program: str) -> Iterator[None]:
    """Within, parsers call the program so. (MindSpore looks for the file sys.argv[0], which therefore stays.)"""
    _program.append(program)
    try:
        yield
    finally:
        _program.pop()


class Parser(argparse.ArgumentParser):
    """A parser that understands `ALIASES`, and says which option is meant where it knows none of a name.

    Args:
        aliases: further words, and the option that each stands for; "" for what is written without one.
    """

    def __init__(self, *args: Any, aliases: Optional[Mapping[str, str]] = None, **keywords: Any) -> None:
        keywords.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        if _program:
            keywords.setdefault("prog", _program[-1])
        super().__init__(*args, **keywords)
        self.aliases = {**ALIASES, **(aliases or {})}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._canonical(words), namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.unknown(unknown)
        return known

    def unknown(self, words: Sequence[str]) -> NoReturn:
        """Exits with a message on words that are no options."""
        names = [name for name in self._option_string_actions if name.startswith("--")]
        meant = nearest(words[0].partition("=")[0], names, "{}") if words[0].startswith("-") else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{meant}")

    def _canonical(self, words: Sequence[str]) -> list[str]:
        known = self._option_string_actions
        said: list[str] = []
        for number, word in enumerate(words):
            if word == "--":
                return [*said, *words[number:]]
            following = words[number + 1].lower() if number + 1 < len(words) else ""
            if word == "--use_ema" and following not in (*TRUE, *FALSE, "null"):
                word = "--use_ema=true"  # what follows is an argument of its own: a file, say
            name, equals, value = word.partition("=")
            if name[:2] == "-b" != name and not equals:  # -b8
                name, equals, value = "-b", "=", name[2:]
            target = self.aliases.get(name)
            if name in known or target is None or (target and target.partition("=")[0] not in known):
                said.append(word)
            elif target:
                said.append(f"{target}{equals}{value}")
            elif equals:
                said.append(value)
        return said

    def error(self, message: str) -> NoReturn:
        let_rank_0_speak()
        super().error(message)


def _boolean(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text.lower() in TRUE


def add_use_ema(parser: argparse.ArgumentParser, verb: str) -> None:
    """The option --use_ema: what a command does (`verb`) with the averaged weights of a file, or with the raw ones."""
    parser.add_argument(
        "--use_ema", nargs="?", const=True, type=_boolean, metavar="true|false",
        help=f"{verb} the averaged (EMA) weights, or (false) the raw ones; default: the averaged where there are any",
    )  # fmt: skip


def add_model(parser: argparse.ArgumentParser, models: Iterable[str], help: str) -> None:
    """The option --model, which must be one of `models` or nothing."""
    known = sorted(models)

    def model(name: str) -> str:
        if name and name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is no model of mindska{nearest(name, known)}")
        return name

    parser.add_argument("--model", default="", type=model, metavar="NAME", help=help)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """The option --overwrite."""
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
