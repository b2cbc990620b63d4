"""The commands of README.md and docs/*.md: where they stand, and which command of mindska each of them is."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from typing import Optional

from commands import ROOT

# The README, and the pages in the order in which the site has them: their commands build on each other.
NAVIGATION = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
PAGES = ["README.md", *(f"docs/{name}" for name in NAVIGATION if (ROOT / "docs" / name).exists())]
BEGINS = ("python ", "mindska ", "mpirun ", "msrun ", "bash ", "pip ")


@dataclass(frozen=True)
class Documented:
    """A command line of a page.

    Attributes:
        command: what it runs of mindska ("train"), or the program ("pip", "tests/parity/report.py").
        words: what follows.
        launcher: the words before it, of mpirun or msrun.
        block: it stands in a block of commands, not within a sentence.
    """

    page: str
    text: str
    command: str
    words: tuple[str, ...]
    launcher: tuple[str, ...]
    block: bool


def command_of(path: str) -> str:
    """The command of mindska that a file of a clone runs; the file itself where it runs none."""
    if path in ("train.py", "validate.py"):
        return path[:-3]
    if path.startswith("scripts/") and path.endswith(".py"):
        called = re.search(r'run\("(\w+)"\)', (ROOT / path).read_text())
        return called[1] if called else path
    return path


def parsed(page: str, text: str, block: bool) -> Optional[Documented]:
    """A line as a command; None: it is none of ours."""
    words = shlex.split(text, comments=True)
    launcher: list[str] = []
    if words[0] in ("mpirun", "msrun"):
        at = next((i for i, word in enumerate(words) if word == "python" or word.endswith(".py")), len(words))
        launcher, words = words[:at], words[at:]
    if not words or len(words) == 1 and words[0] in ("mindska", "python"):
        return None
    if words[0] in ("python", "mindska", "bash"):
        first = words.pop(0)
        if words[:2] == ["-m", "pytest"]:
            words = ["pytest", *words[2:]]
        if words[:2] == ["-m", "mkdocs"]:
            words = words[1:]
        command = words.pop(0)
        command = command if first == "mindska" else command_of(command)
    else:
        command = command_of(words.pop(0))
    return Documented(page, text, command, tuple(words), tuple(launcher), block)


def blocks(page: str) -> list[str]:
    """The blocks of shell commands of a page, long lines joined."""
    text = (ROOT / page).read_text()
    found = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.M | re.S)
    return [block.replace("\\\n", " ") for block in found]


@cache
def documented() -> list[Documented]:
    """The commands of all pages, those of scripts with loops (docs/finetune.md's data) left out."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        lines = [line for block in blocks(page) if "\ndone" not in block for line in block.splitlines() if line.strip()]
        # Within a sentence, a command may go on in the next line.
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        inline = [re.sub(r"\s+", " ", each) for each in re.findall(r"`([^`]+)`", prose)]
        for each, block in [*((line, True) for line in lines), *((line, False) for line in inline)]:
            if each.startswith(BEGINS) and (one := parsed(page, each, block)):
                found.append(one)
            else:
                assert not block, f"{page}: {each}: which command is this?"
    return found


def five_commands() -> list[Documented]:
    """Those for one's own data that test_console runs from a wheel."""
    page = "docs/own_data.md"
    (block,) = [block for block in blocks(page) if "check_data" in block]
    return [parsed(page, line, True) for line in block.strip().splitlines()]
