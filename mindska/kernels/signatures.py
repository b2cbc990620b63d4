"""The signatures of the C++ operators, read from their code; inputs that do not fit are refused before anything runs.

The texts stand in the .cc files, as second argument of `MINDSKA_OPERATOR`; signature.h says how to read them, and
checks them again. Shapes of the outputs come from them as well. `enumerators` reads lists of names that both languages
share.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Optional, Union

from ..errors import SettingError

MAX_ELEMENTS = 1 << 36
Shape = Sequence[int]
_OPERATOR = re.compile(r'MINDSKA_OPERATOR\(mindska_(\w+),((?:\s*"[^"]*")+)\)')
_SHAPE = r"\((?:[^()]|\([^()]*\))*\)"
_TENSOR = re.compile(rf"(\w+)(\+?) (?:\{{([^}}]*)\}}|({_SHAPE}(?: or {_SHAPE})*))(?: (int32|uint8))?")


def _split(text: str) -> tuple[str, ...]:
    """Parts between commas that no parentheses enclose."""
    return tuple(part.strip() for part in re.split(r",(?![^()]*\))", text))


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a signature.

    Attributes:
        name: its name in the signature.
        shapes: the shapes that it may have, each a tuple of names and expressions.
        numbers: the names of its elements where they are options, an array of int32.
        type: "float32", "int32" or "uint8".
        variadic: whether it stands for one or more tensors, the last ones.
    """

    name: str
    shapes: tuple[tuple[str, ...], ...]
    numbers: tuple[str, ...] = ()
    type: str = "float32"
    variadic: bool = False

    @classmethod
    def read(cls, text: str) -> list[TensorSpec]:
        """The tensors of one side of a signature."""
        found = []
        for name, variadic, numbers, shapes, kind in _TENSOR.findall(text):
            names = _split(numbers) if numbers else ()
            alternatives = tuple(_split(shape[1:-1]) for shape in re.findall(_SHAPE, shapes)) or ((str(len(names)),),)
            found.append(cls(name, alternatives, names, "int32" if names else kind or "float32", bool(variadic)))
        return found


@dataclass
class Signature:
    """The signature of an operator.

    Attributes:
        name: the operator's name, without "mindska_".
        text: the signature as signature.h describes it.
        file: the stem of the .cc file.
        inputs, outputs: the tensors.
        conditions: what follows "where".
    """

    name: str
    text: str
    file: str
    inputs: list[TensorSpec] = field(init=False)
    outputs: list[TensorSpec] = field(init=False)
    conditions: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        tensors, _, conditions = self.text.partition(" where ")
        self.inputs, self.outputs = (TensorSpec.read(side) for side in tensors.split("->"))
        self.conditions = _split(conditions) if conditions else ()

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of all numbers that are given as arrays of int32."""
        return tuple(name for tensor in self.inputs for name in tensor.numbers)

    def check_types(self, types: Sequence[str]) -> list[str]:
        """The outputs' types, for inputs of these types.

        Raises:
            SettingError: another type was expected (the operators know float32, and int32 or uint8 where they say so).
        """
        for tensor, found in zip(self._all_inputs(len(types)), types):
            if found != tensor.type:
                raise SettingError(f"{self.name}: {tensor.name} is {found}; expected {tensor.type}")
        return [tensor.type for tensor in self.outputs]

    def infer(self, shapes: Sequence[Shape], numbers: Mapping[str, int]) -> list[list[int]]:
        """The outputs' shapes, for inputs of these shapes; -1 stands for a size that is not known yet.

        Raises:
            SettingError: the shapes are not those of the signature; the message has all of them.
        """
        tensors, sizes = self._all_inputs(len(shapes)), dict(numbers)
        try:
            if len(tensors) != len(shapes):
                raise SettingError(f"there are {len(shapes)} inputs, not {len(tensors)}")
            for tensor, shape in zip(tensors, shapes):
                _bind(tensor, shape, sizes)
            for tensor, shape in zip(tensors, shapes):  # expressions, now that all names are known
                _compare(tensor, shape, sizes)
            for condition in self.conditions:
                if _value(condition, sizes) is False:
                    raise SettingError(f"not {condition}{_where(condition, sizes)}")
        except SettingError as error:
            found = ", ".join(f"{t.name} {tuple(shape)}" for t, shape in zip(tensors, shapes) if not t.numbers)
            given = "".join(f", {name} = {value}" for name, value in numbers.items())
            raise SettingError(f"{self.name}: {error}. Found {found}{given}; expected {self.text}") from None
        return [_shape_of(tensor, sizes) for tensor in self.outputs]

    def _all_inputs(self, count: int) -> list[TensorSpec]:
        *others, last = self.inputs
        return [*others, *[last] * max(1, count - len(others))] if last.variadic else self.inputs


def _bind(tensor: TensorSpec, shape: Shape, sizes: dict[str, Any]) -> None:
    """Learns the sizes that have names; of several shapes the first that fits counts."""
    if any(size == 0 or size < -2 for size in shape):
        raise SettingError(f"{tensor.name} has no elements")
    if math.prod(shape) > MAX_ELEMENTS:
        raise SettingError(f"{tensor.name} is too large")
    if -2 in shape:  # not even the rank is known yet
        return
    errors = []
    for choice, expected in enumerate(tensor.shapes):
        try:
            learned = _fit(tensor.name, expected, shape, sizes)
        except SettingError as error:
            errors.append(error)
            continue
        sizes.update(learned)
        if len(tensor.shapes) > 1:
            sizes[tensor.name] = choice
        return
    raise errors[0]


def _fit(name: str, expected: tuple[str, ...], shape: Shape, sizes: Mapping[str, Any]) -> dict[str, Any]:
    if expected == ("*",):
        return {}
    if expected == ("...",):
        other = sizes.get("...", shape)
        if len(other) != len(shape) or any(-1 not in pair and pair[0] != pair[1] for pair in zip(other, shape)):
            raise SettingError(f"{name} has another shape")
        return {"...": other}
    if len(expected) != len(shape):
        raise SettingError(f"{name} has {len(shape)} dimensions, not {len(expected)}")
    learned: dict[str, Any] = {}
    for word, size in zip(expected, shape):
        known = {**sizes, **learned}.get(word, -1) if word.isidentifier() else -1
        if -1 not in (known, size) and known != size:
            raise SettingError(f"{word} is {known} and, in {name}, {size}")
        if word.isidentifier():
            learned[word] = max(known, size)
        elif word.isdigit() and size not in (-1, int(word)):
            raise SettingError(f"{name} has {size} where {word} is expected")
    return learned


def _compare(tensor: TensorSpec, shape: Shape, sizes: Mapping[str, Any]) -> None:
    if -2 in shape:  # as in `_bind`
        return
    expected = tensor.shapes[sizes.get(tensor.name, 0) if len(tensor.shapes) > 1 else 0]
    for word, size in zip(expected, shape):
        value = None if word in ("*", "...") else _value(word, sizes)
        if value is not None and size not in (-1, value):
            raise SettingError(f"{word} is {value} and, in {tensor.name}, {size}")


_ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv,
    ast.Mod: operator.mod, ast.Eq: operator.eq, ast.LtE: operator.le, ast.GtE: operator.ge,
}  # fmt: skip
_parse = cache(ast.parse)


def _value(expression: str, sizes: Mapping[str, Any]) -> Optional[Union[int, bool]]:
    """The value of an expression or a condition; None where a size is not known yet."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            known = sizes.get(node.id, -1)
            return None if known == -1 else known
        sign: ast.AST
        if isinstance(node, ast.Compare):
            left, sign, right = node.left, node.ops[0], node.comparators[0]
        else:
            assert isinstance(node, ast.BinOp)
            left, sign, right = node.left, node.op, node.right
        pair = value(left), value(right)
        return None if None in pair else _ARITHMETIC[type(sign)](*pair)

    try:
        return value(_parse(expression, mode="eval").body)
    except ZeroDivisionError:
        raise SettingError(f"{expression} has no value{_where(expression, sizes)}") from None


def _where(expression: str, sizes: Mapping[str, Any]) -> str:
    words = dict.fromkeys(re.findall(r"[A-Za-z_]\w*", expression))
    return f" with {', '.join(f'{word} = {sizes.get(word)}' for word in words)}" if words else ""


def _shape_of(tensor: TensorSpec, sizes: Mapping[str, Any]) -> list[int]:
    if tensor.shapes[0] == ("...",):
        return list(sizes.get("...", [-2]))
    if tensor.shapes[0] == ("*",):
        return [-2]
    values = [_value(word, sizes) for word in tensor.shapes[0]]
    return [-1 if value is None else int(value) for value in values]


@cache
def signatures(folder: Path = Path(__file__).parent) -> dict[str, Signature]:
    """All operators' signatures, by name."""
    found = {}
    for file in sorted(folder.glob("*.cc")):
        for name, literals in _OPERATOR.findall(file.read_text(encoding="utf-8")):
            text = " ".join("".join(re.findall(r'"([^"]*)"', literals)).split())
            found[name] = Signature(name, text, file.stem)
    return found


def enumerators(name: str, file: Path = Path(__file__).parent / "epilogue.h") -> tuple[str, ...]:
    """The names of a C++ enumeration, `enum class NAME : int32_t { ... }`, in the order of their numbers from 0."""
    (names,) = re.findall(rf"enum class {name}\b[^{{]*{{([^}}]*)}}", file.read_text(encoding="utf-8"))
    return tuple(word.strip() for word in names.split(","))
