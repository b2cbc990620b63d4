"""Lists the recipes that come with mindska: `--config NAME` finds them, from any folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from mindska.arguments import Parser
from mindska.errors import clear_errors
from mindska.recipes import folder, recipes


def main(arguments: Optional[Sequence[str]] = None) -> None:
    Parser(description=__doc__).parse_args(arguments)
    with clear_errors():
        known = recipes()
        names, models = (max(len(getattr(recipe, part)) for recipe in known) for part in ("name", "model"))
        for recipe in known:
            print(f"{recipe.name:{names}}  {recipe.model:{models}}  {recipe.title}")
        print(f"\nTrain by one: mindska train --config {known[0].name} --data_dir DATA")
        print(f"To change one, copy its file from {folder()}, or set options behind it.")
