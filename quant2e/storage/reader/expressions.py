"""Formulas of sizes: the text that sympy writes becomes a sympy expression, by a grammar and not by evaluation.

    Add(Mul(Integer(2), Symbol('s0', positive=True, integer=True)), Integer(1))   =>   2*s0 + 1

A formula is a number, a symbol, or one of a table of functions of formulas. Numbers have 64 bits, also those in
between; powers have small exponents; a formula has so many parts and levels and no more. Since sympy multiplies out
what it compares and divides, the terms are counted that a formula would have then, before sympy sees it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from quant2e.errors import FileFormatError

_TOKEN = re.compile(
    r"\s*(?:(?P<number>-?\d{1,20})(?![\w.])|'(?P<string>[\w.+-]{1,100})'|(?P<name>[A-Za-z]\w{0,60})"
    r"|(?P<mark>[(),=]))",
    re.ASCII,
)
_LONGEST, _DEEPEST, _LARGEST = 10_000, 40, 1 << 63
_EXPONENT, _MOST_ARGUMENTS = 8, 50
_MOST_TERMS, _MOST_OPERAND_TERMS, _MOST_COMPARED = 512, 48, 24
"""Terms of a formula that is multiplied out; of an operand of a division or the like; and of a maximum's operands."""
_SYMBOL, _FLOAT = re.compile(r"[A-Za-z_]\w*", re.ASCII), re.compile(r"-?\d+(\.\d*)?(e[+-]?\d{1,3})?", re.ASCII)
_ASSUMPTIONS = frozenset({"integer", "positive", "nonnegative", "real", "finite", "nonzero"})
_VALUES: Mapping[str, Any] = {"True": True, "False": False, "None": None}


class _Token(NamedTuple):
    kind: str
    text: str


@cache
def _functions() -> Mapping[str, Callable[..., Any]]:
    """The functions of a formula, by the names under which sympy writes them."""
    from torch.utils._sympy import functions as own
    from torch.utils._sympy.functions import sympy  # importing quant2e does not load sympy

    names = (
        "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
        "IntTrueDiv", "FloatTrueDiv", "FloatPow", "TruncToFloat", "TruncToInt", "RoundToInt", "ToFloat", "Identity",
    )  # fmt: skip
    relations = ("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan")
    logic = ("And", "Or", "Not")
    return {
        **{name: getattr(own, name) for name in names},
        **{name: getattr(sympy, name) for name in ("Add", "Mul", "Max", "Min", *relations, *logic)},
        "Rational": lambda p, q: sympy.Rational(_whole(p), _whole(q)),
        "Pow": _power,
        "PowByNatural": lambda base, exponent: own.PowByNatural(base, _small(exponent)),
    }


def read_formula(text: str, symbols: dict[str, Any]) -> Any:
    """The sympy expression that ``text`` writes down. ``symbols``: those known so far, by name; new ones are added.

    Raises `FileFormatError` for anything that is no such formula, or too large a one.
    """
    try:
        return _Reader(text, symbols).formula()
    except FileFormatError as error:
        raise FileFormatError(f"{text[:120]!r} is not a plain shape formula: {error}") from error
    except Exception as error:  # sympy refuses arguments in many ways: division by zero, no order, no integer
        raise FileFormatError(
            f"{text[:120]!r} is not a plain shape formula: {type(error).__name__}: {error}"
        ) from error


class _Reader:
    """Recursive descent over the tokens of one formula."""

    def __init__(self, text: str, symbols: dict[str, Any]) -> None:
        if len(text) > _LONGEST:
            raise FileFormatError("it is too long")
        self._tokens = _tokens(text)
        self._next = 0
        self._terms = 1
        self._symbols = symbols

    def formula(self) -> Any:
        """The whole text as one expression."""
        value = self._expression(0)
        if self._next != len(self._tokens):
            raise FileFormatError("something follows it")
        return value

    def _expression(self, level: int) -> Any:
        from torch.utils._sympy.functions import sympy

        if level > _DEEPEST:
            raise FileFormatError("it is nested too deeply")
        kind, text = self._take()
        if kind == "number":
            return sympy.Integer(_bounded(int(text)))
        if kind != "name":
            raise FileFormatError(f"{text!r} is not expected there")
        if text in ("true", "false"):
            return sympy.true if text == "true" else sympy.false
        self._expect("(")
        if text == "Symbol":
            return self._symbol()
        if text == "Integer":
            value = int(self._expect_kind("number"))
            self._expect(")")
            return sympy.Integer(_bounded(value))
        if text == "Float":
            return self._float()
        function = _functions().get(text)
        if function is None:
            raise FileFormatError(f"'{text}' is no function of such formulas")
        arguments, terms = self._arguments(level)
        self._terms = _terms(text, arguments, terms)
        found = function(*arguments)
        if getattr(found, "is_Number", False) and not -_LARGEST <= found < _LARGEST:
            raise FileFormatError("a number in it has more than 64 bits")
        return found

    def _arguments(self, level: int) -> tuple[list[Any], list[int]]:
        """Operands of a function, and how many terms each has when it is multiplied out."""
        found, terms = [], []
        while True:
            self._terms = 1
            found.append(self._expression(level + 1))
            terms.append(self._terms)
            if len(found) > _MOST_ARGUMENTS:
                raise FileFormatError("a function in it has too many arguments")
            if self._take() == _Token("mark", ")"):
                return found, terms
            if self._tokens[self._next - 1] != _Token("mark", ","):
                raise FileFormatError("a comma is missing")

    def _float(self) -> Any:
        from torch.utils._sympy.functions import sympy

        text = self._expect_kind("string")
        if not _FLOAT.fullmatch(text):
            raise FileFormatError(f"'{text}' is no number")
        if [self._take().text for _ in range(4)] != [",", "precision", "=", "53"]:
            raise FileFormatError("a number in it is no double")
        self._expect(")")
        return sympy.Float(text, precision=53)

    def _symbol(self) -> Any:
        from torch.utils._sympy.functions import sympy

        name = self._expect_kind("string")
        if "__" in name or not _SYMBOL.fullmatch(name):
            raise FileFormatError(f"'{name}' is no name of a size")
        assumptions = {}
        while self._take() == _Token("mark", ","):
            key = self._expect_kind("name")
            self._expect("=")
            value = self._expect_kind("name")
            if key not in _ASSUMPTIONS or value not in _VALUES or key in assumptions:
                raise FileFormatError(f"a size cannot be {key}={value}")
            assumptions[key] = _VALUES[value]
        if self._tokens[self._next - 1] != _Token("mark", ")"):
            raise FileFormatError("a bracket is missing")
        made = sympy.Symbol(name, **assumptions)
        if self._symbols.setdefault(name, made) != made:
            raise FileFormatError(f"the size '{name}' is described in two ways")
        return made

    def _take(self) -> _Token:
        if self._next == len(self._tokens):
            raise FileFormatError("it ends too early")
        self._next += 1
        return self._tokens[self._next - 1]

    def _expect(self, mark: str) -> None:
        if self._take() != _Token("mark", mark):
            raise FileFormatError(f"{mark!r} is missing")

    def _expect_kind(self, kind: str) -> str:
        token = self._take()
        if token.kind != kind:
            raise FileFormatError(f"{token.text!r} is not expected there")
        return token.text


def _terms(function: str, arguments: Sequence[Any], terms: Sequence[int]) -> int:
    """How many terms the function of these arguments has when it is multiplied out. Raises `FileFormatError`."""
    if function == "Add":
        count = sum(terms)
    elif function == "Mul":
        count = math.prod(terms)
    elif function in ("Pow", "PowByNatural"):
        exponent: Any = arguments[1] if len(arguments) == 2 else None
        whole = getattr(exponent, "is_Integer", False)
        count = terms[0] ** min(abs(int(exponent)), _EXPONENT) if whole else terms[0]
    elif function in ("Max", "Min"):
        count = sum(terms)
        if count > _MOST_COMPARED:
            raise FileFormatError("a function in it has too many arguments")
    else:
        if max(terms) > _MOST_OPERAND_TERMS:
            raise FileFormatError("a function in it has too large an argument")
        count = 1
    if count > _MOST_TERMS:
        raise FileFormatError("it has too many terms")
    return count


def _tokens(text: str) -> list[_Token]:
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise FileFormatError(f"{text[position : position + 20]!r} is not expected there")
        assert match.lastgroup is not None
        tokens.append(_Token(match.lastgroup, match[match.lastgroup]))
        position = match.end()
    return tokens


def _bounded(value: int) -> int:
    if not -_LARGEST <= value < _LARGEST:
        raise FileFormatError("a number in it has more than 64 bits")
    return value


def _whole(value: Any) -> int:
    if not value.is_Integer:
        raise FileFormatError("a part of a fraction is no number")
    return int(value)


def _small(exponent: Any) -> Any:
    if not exponent.is_Integer or not -_EXPONENT <= exponent <= _EXPONENT:
        raise FileFormatError(f"an exponent is not a whole number of at most {_EXPONENT}")
    return exponent


def _power(base: Any, exponent: Any) -> Any:
    from torch.utils._sympy.functions import sympy

    if getattr(exponent, "is_Rational", False) and not exponent.is_Integer and abs(exponent.p) == 1 == exponent.q // 2:
        return sympy.Pow(base, exponent)  # a square root
    return sympy.Pow(base, _small(exponent))
