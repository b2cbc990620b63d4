"""What a setting is: its default and help, its choices or range, and whether a run may change it."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Optional

from ..errors import ConfigError

SIGNED = ("mean", "std")  # they have their own checks, with the pixels


def option(default: Any, help: str, choices: Optional[Sequence] = None, heading: str = "", **rules: Any) -> Any:
    """A setting; in --help it stands under `heading`, as those after it do.

    `rules` may hold, for what is not so by default:

    - at_least, at_most, above, below: the range of the number, or of each of several. Numbers are at least 0, but for
      those with an `above` or `at_least` of their own.
    - share: of 1, so that numbers from 2 to 100 are refused as percentages.
    - hint: what to say to whoever is out of range, where other toolboxes have another unit.
    - may_change: a run may go on with another value.
    - path: it names a file or folder; `~` is the home folder.
    - metavar: what stands for a value in --help.
    - first_start: a run needs it when it begins and never again, so that later starts need not have the same.
    """
    known = {"at_least", "at_most", "above", "below", "share", "hint", "path", "may_change", "first_start", "metavar"}
    if unknown := set(rules) - known:
        raise TypeError(f"a setting has no {unknown}")
    return field(default=default, metadata={"help": help, "choices": choices, "heading": heading, **rules})


def _expected(rules: Mapping[str, Any]) -> str:
    """A setting's range in words."""
    low, high = rules.get("at_least"), rules.get("at_most")
    bottom, top = rules.get("above", low), rules.get("below", high)
    if (low, high) == (0, 1):
        return "a share between 0 and 1"
    if top is not None:
        return f"a number in {'(' if low is None else '['}{bottom:.9g}, {top:.9g}{')' if high is None else ']'}"
    if low is None:
        return f"a number above {bottom:g}" if bottom else "a positive number"
    return f"at least {low:g}" if low else "0 or more"


def check_number(name: str, number: float, rules: Mapping[str, Any]) -> None:
    """ConfigError when a number is out of its setting's range, or of that of the numbers in which training computes."""
    if not math.isfinite(number):
        raise ConfigError(f"{name} is {number}; expected a finite number")
    whole = isinstance(number, int)
    smallest, largest = (1, 2**32 - 1) if whole else (2.0**-126, (2 - 2.0**-23) * 2.0**127)
    rules = {"at_least": 0, **rules} if "above" not in rules else rules
    if name in SIGNED:
        rules = {}
    share = rules.get("share") or 1 in (rules.get("at_most"), rules.get("below"))
    percent = f"{number:g} % is {number / 100:g}" if share and 2 <= number <= 100 else ""
    held = number if whole or abs(number) > largest else struct.unpack("f", struct.pack("f", number))[0]
    if not (
        rules.get("at_least", number) <= number <= rules.get("at_most", number)
        and rules.get("above", -math.inf) < held < rules.get("below", math.inf)  # 0.99999999 is 1 in float32
    ):
        hint = rules.get("hint") or percent
        raise ConfigError(f"{name} is {number}; expected {_expected(rules)}" + (f" ({hint})" if hint else ""))
    if percent:
        raise ConfigError(f"{name} is {number}; expected a share of 1 ({percent})")
    if number and not smallest <= abs(number) <= largest:
        zero = "" if "above" in rules or rules.get("at_least") else "0, or "
        kind = "32 bits" if whole else "float32"
        bounds = f"{zero}a number from {smallest:.5g} to {largest:.5g}"
        raise ConfigError(f"{name} is {number}; expected {bounds}: training computes in {kind}")
