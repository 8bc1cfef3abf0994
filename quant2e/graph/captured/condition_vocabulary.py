"""Vocabulary of conditions: the operators, constants and functions that they may name, each safe on any operands.

power(2, 3) = 8        power(2, 10**9), "a" * 3, "%9d" % 1  =  UnfitOperandError
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

_BITS = 4096
"""The longest integer that a power may make."""


class UnfitOperandError(Exception):
    """A value that has no such property: a condition on it does not hold."""


def power(base: Any, exponent: Any) -> Any:
    """``base ** exponent``. Raises `UnfitOperandError` when the integer would be too long."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _BITS:
        raise UnfitOperandError
    return base**exponent


def _dtype_text(value: Any) -> str:
    if not isinstance(value, torch.dtype):
        raise UnfitOperandError
    return str(value)


def _fills_its_memory(*numbers: Any) -> int:
    """Whether a tensor, given by its sizes and then its strides, has neither gaps nor overlaps; torch writes it so."""
    half = len(numbers) // 2
    expected = 1
    for size, stride in sorted(zip(numbers[:half], numbers[half:], strict=True), key=operator.itemgetter(1)):
        if size != 1 and stride != expected:
            return 0
        expected *= size
    return 1


COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "is": operator.is_, "is not": operator.is_not,
}  # fmt: skip


def _on_numbers(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The function, for numbers only: times and modulo of a text can make one of any length."""

    def apply(a: Any, b: Any) -> Any:
        if isinstance(a, (str, bytes, list, tuple)) or isinstance(b, (str, bytes, list, tuple)):
            raise UnfitOperandError
        return function(a, b)

    return apply


SUMS = {"+": _on_numbers(operator.add), "-": _on_numbers(operator.sub)}
PRODUCTS = {
    "*": _on_numbers(operator.mul), "//": _on_numbers(operator.floordiv), "%": _on_numbers(operator.mod),
    "/": _on_numbers(operator.truediv),
}  # fmt: skip
CONSTANTS: Mapping[str, Any] = {
    "None": None, "True": True, "False": False, "inf": math.inf, "math.inf": math.inf, "math.nan": math.nan,
}  # fmt: skip
_MATH = (
    "isnan", "floor", "ceil", "trunc", "sqrt", "log2", "log", "exp", "cos", "cosh", "acos", "sin", "sinh", "asin",
    "tan", "tanh", "atan",
)  # fmt: skip
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"math.{name}": getattr(math, name) for name in _MATH},
    "max": max, "min": min, "abs": abs, "round": round, "str": _dtype_text, "int": int, "float": float,
    "torch.sym_float": torch.sym_float, "torch.sym_int": torch.sym_int, "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min, "torch.sym_not": torch.sym_not, "torch.sym_ite": torch.sym_ite,
    "torch._sym_sqrt": torch._sym_sqrt,  # type: ignore[attr-defined]
    "cast_symbool_to_symint_guardless": int, "IsNonOverlappingAndDenseIndicator": _fills_its_memory,
}  # fmt: skip
"""Functions that torch writes into conditions. ``str`` is that of a dtype."""
