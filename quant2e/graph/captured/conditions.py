"""Conditions on the inputs of a graph: text in a small grammar, interpreted, and never run as Python.

    x.size()[0] % 2 == 0        batch['mask'] is None        2 <= x.size()[1] and x.size()[1] <= max(8, y.size()[0])

The text is what ``torch.export`` writes about sizes, and what `quant2e.graph.captured.inputs` writes about dimensions,
fixed sizes and constants. It can mention the inputs (tensors and numbers, not their attributes), numbers, text, and a
table of functions; so whoever writes it, a file for example, can state a condition and do nothing else.

    expression := choice ("or" choice)*            choice := fact ("and" fact)*         fact := "not" fact | comparison
    comparison := sum (("==" | "is" | …) sum)*     sum := product (("+" | "-") product)*
    product := factor (("*" | "//" | "%" | "/") factor)*               factor := ("-" | "+") factor | atom ["**" factor]
    atom := number | text | constant | function "(" expressions ")" | "(" expression ")" | input [property]
    property := ".size()[n]" | ".stride()[n]" | ".storage_offset()" | ".dim()" | ".dtype" | ".shape[n]" | ".ndim"
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from quant2e.graph.captured.condition_vocabulary import (
    COMPARISONS,
    CONSTANTS,
    FUNCTIONS,
    PRODUCTS,
    SUMS,
    UnfitOperandError,
    power,
)

Path: TypeAlias = tuple[Any, ...]
"""How an input is reached: the name of an argument, then keys, positions and attributes."""

Term: TypeAlias = Callable[[Sequence[Any]], Any]
"""A part of a condition as a function of the values of all inputs, flattened."""


class Field(NamedTuple):
    """An attribute on the way to an input, of a named tuple or a dataclass."""

    name: str


class _Key(NamedTuple):
    """A key or position on the way to an input; None can be one."""

    value: Any


class ConditionError(ValueError):
    """A text that is no condition in this grammar, or that mentions what is no input."""


_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)|(?P<text>'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\")"
    r"|(?P<name>[^\W\d]\w*)|(?P<mark>//|\*\*|[=!<>]=|[-+*/%<>()\[\].,]))"
)
_LONGEST, _DEEPEST, _DIGITS = 20_000, 50, 40


class _Token(NamedTuple):
    kind: str
    text: str


def path_of(text: str) -> Path:
    """The path that ``text`` spells, such as ``batch['z'][0]``. Raises `ConditionError`."""
    reader = _Reader(text, {})
    path = reader.path()
    if not reader.at_end:
        raise ConditionError(f"{text!r} is not the way to an input")
    return path


class Condition:
    """One condition, read for a graph whose flattened inputs are reached by ``paths``.

    Raises `ConditionError` when it is none, or mentions another input.
    """

    __slots__ = ("_holds", "text")

    def __init__(self, text: str, paths: Mapping[Path, int]) -> None:
        self.text = text
        self._holds = _Reader(text, paths).condition()

    def holds(self, leaves: Sequence[Any]) -> bool:
        """Whether it holds for these inputs; False when they lack what it is about."""
        try:
            return bool(self._holds(leaves))
        except (UnfitOperandError, IndexError, TypeError, ZeroDivisionError, OverflowError, ValueError):
            return False


def guard_text(guard: str, names: Sequence[str], leaves: Sequence[str]) -> str:
    """A guard as ``torch.export`` keeps it in a file, as a condition: ``L['x'].size()[0]`` becomes ``x.size()[0]``.

    ``names``: of the arguments. ``leaves``: how each flattened input is reached. What came in through ``*args`` has
    arguments of its own: ``L['args'][0]`` becomes ``args_0``. Raises `ConditionError`.
    """
    tokens, written, position = _tokens(guard), [], 0
    while position < len(tokens):
        window = [token.text for token in tokens[position : position + 4]]
        if window[:2] == ["L", "["] and len(window) == 4 and window[3] == "]" and tokens[position + 2].kind == "text":
            name, position = _literal(window[2]), position + 4
            index = [token.text for token in tokens[position : position + 3]]
            number = index[1] if len(index) == 3 and index[0] == "[" and index[2] == "]" else ""
            if name == "flat_args" and number.isdigit() and int(number) < len(leaves):
                written.append(leaves[int(number)])
                position += 3
            elif name not in names and number.isdigit() and f"{name}_{number}" in names:
                written.append(f"{name}_{number}")
                position += 3
            elif name in names:
                written.append(name)
            else:
                raise ConditionError(f"{guard[:200]!r} is about {name[:80]!r}, which is no input")
            continue
        written.append(tokens[position].text)
        position += 1
    return _spaced(written)


_WORDS = ("and", "or", "not", "is")


def _spaced(words: Sequence[str]) -> str:
    """Words of a condition with spaces as Python code has them."""
    text, before, sign = "", "", False
    for word in words:
        value_before = before not in _WORDS and (before[-1:].isalnum() or before[-1:] in ("_", ")", "]", "'", '"'))
        joined = word in (")", "]", ".", ",", "[") or (word == "(" and value_before)
        text += word if joined or sign or before in ("", "(", "[", ".") else f" {word}"
        before, sign = word, word in ("-", "+") and not value_before
    return text


def _tokens(text: str) -> list[_Token]:
    if len(text) > _LONGEST:
        raise ConditionError(f"a condition of {len(text)} characters is too long")
    found, position = [], 0
    end = len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise ConditionError(f"{text[:200]!r} is no condition that can be checked: at {text[position:][:20]!r}")
        assert match.lastgroup is not None
        found.append(_Token(match.lastgroup, match[match.lastgroup]))
        position = match.end()
    return found


def _literal(text: str) -> Any:
    """The value of a quoted text; it has no other form than that, so nothing is evaluated."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ConditionError(f"{text[:80]!r} is no text") from error


class _Reader:
    """Recursive descent over the tokens of one condition."""

    def __init__(self, text: str, paths: Mapping[Path, int]) -> None:
        self._text, self._paths = text, paths
        self._tokens = _tokens(text)
        self._next = 0
        self._depth = 0

    @property
    def at_end(self) -> bool:
        """Whether everything has been read."""
        return self._next == len(self._tokens)

    def condition(self) -> Term:
        """The whole text as one expression."""
        term = self._either()
        if not self.at_end:
            raise self._unreadable()
        return term

    def path(self) -> Path:
        """A name, and the keys, positions and attributes behind it."""
        if self._peek().kind != "name":
            raise self._unreadable()
        parts: list[Any] = [self._take().text]
        while (part := self._part()) is not None:
            parts.append(part)
        return tuple(parts)

    def _part(self) -> Any:
        """One step on the way to an input; None where there is none."""
        if self._accept("."):
            if self._peek().kind != "name":
                raise self._unreadable()
            return Field(self._take().text)
        if not self._accept("["):
            return None
        negative = self._accept("-")
        token = self._take()
        key: Any = None
        if token.kind == "text":
            key = _literal(token.text)
        elif token.kind == "number":
            key = _number(token.text) * (-1 if negative else 1)
        elif token.text in CONSTANTS:
            key = CONSTANTS[token.text]
        else:
            raise self._unreadable()
        self._expect("]")
        return _Key(key)

    def _either(self) -> Term:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ConditionError(f"the condition {self._text[:200]!r} is nested too deeply")
        terms = [self._all()]
        while self._accept("or"):
            terms.append(self._all())
        self._depth -= 1
        return terms[0] if len(terms) == 1 else lambda leaves: any(term(leaves) for term in terms)

    def _all(self) -> Term:
        terms = [self._fact()]
        while self._accept("and"):
            terms.append(self._fact())
        return terms[0] if len(terms) == 1 else lambda leaves: all(term(leaves) for term in terms)

    def _fact(self) -> Term:
        negations = 0
        while self._accept("not"):
            negations += 1
        term = self._comparison()
        return term if not negations else lambda leaves: bool(term(leaves)) is (negations % 2 == 0)

    def _comparison(self) -> Term:
        terms, marks = [self._sum()], []
        while (mark := self._comparison_mark()) is not None:
            marks.append(COMPARISONS[mark])
            terms.append(self._sum())
        if not marks:
            return terms[0]

        def compare(leaves: Sequence[Any]) -> Any:
            values = [term(leaves) for term in terms]
            return all(compared(a, b) for compared, a, b in zip(marks, values, values[1:], strict=False))

        return compare

    def _comparison_mark(self) -> str | None:
        text = self._peek().text
        if self._peek().kind == "text" or text not in COMPARISONS:
            return None
        self._next += 1
        return "is not" if text == "is" and self._accept("not") else text

    def _sum(self) -> Term:
        return self._left(self._product, SUMS)

    def _product(self) -> Term:
        return self._left(self._factor, PRODUCTS)

    def _left(self, operand: Callable[[], Term], marks: Mapping[str, Callable[[Any, Any], Any]]) -> Term:
        """Operands that are joined from the left."""
        first, rest = operand(), []
        while self._peek().kind == "mark" and self._peek().text in marks:
            rest.append((marks[self._take().text], operand()))
        if not rest:
            return first

        def join(leaves: Sequence[Any]) -> Any:
            value = first(leaves)
            for mark, term in rest:
                value = mark(value, term(leaves))
            return value

        return join

    def _factor(self) -> Term:
        negative = False
        while self._peek().text in ("-", "+") and self._peek().kind == "mark":
            negative ^= self._take().text == "-"
        term = self._atom()
        if self._accept("**"):
            self._depth += 1
            if self._depth > _DEEPEST:
                raise ConditionError(f"the condition {self._text[:200]!r} is nested too deeply")
            base, exponent = term, self._factor()
            self._depth -= 1
            term = lambda leaves: power(base(leaves), exponent(leaves))  # noqa: E731
        return term if not negative else lambda leaves: -term(leaves)

    def _atom(self) -> Term:
        token = self._peek()
        if self._accept("("):
            term = self._either()
            self._expect(")")
            return term
        if token.kind in ("number", "text"):
            self._next += 1
            value = _number(token.text) if token.kind == "number" else _literal(token.text)
            return lambda _: value
        if token.kind != "name":
            raise self._unreadable()
        return self._named()

    def _named(self) -> Term:
        """A function of the table, a constant, or an input."""
        for length in (3, 1):
            words = [token.text for token in self._tokens[self._next : self._next + length]]
            name = "".join(words) if len(words) == length else ""
            after = self._tokens[self._next + length : self._next + length + 1]
            if name in FUNCTIONS and after == [_Token("mark", "(")]:
                self._next += length
                return self._call(FUNCTIONS[name])
            if name in CONSTANTS and (name,) not in self._paths:
                self._next += length
                constant = CONSTANTS[name]
                return lambda _: constant
        return self._input()

    def _call(self, function: Callable[..., Any]) -> Term:
        self._expect("(")
        terms = [self._either()]
        while self._accept(","):
            terms.append(self._either())
        self._expect(")")

        def call(leaves: Sequence[Any]) -> Any:
            return function(*(term(leaves) for term in terms))

        return call

    def _input(self) -> Term:
        path: Path = (self._take().text,)
        while path not in self._paths:
            if (part := self._part()) is None:
                raise self._unreadable()
            path = (*path, part)
        index = self._paths[path]
        if not self._accept("."):
            return lambda leaves: _plain(leaves[index])
        name = self._take().text
        if name in ("dtype", "ndim"):
            return lambda leaves: getattr(_tensor(leaves[index]), name)
        if name not in ("size", "stride", "shape", "dim", "storage_offset"):
            raise self._unreadable()
        if name != "shape":
            self._expect("(")
            self._expect(")")
        if name in ("dim", "storage_offset"):
            return lambda leaves: getattr(_tensor(leaves[index]), name)()
        self._expect("[")
        place = self._take()
        self._expect("]")
        if not place.text.isdigit() or len(place.text) > 3:
            raise self._unreadable()
        axis, strides = int(place.text), name == "stride"
        return lambda leaves: _sizes(leaves[index], strides=strides)[axis]

    def _peek(self) -> _Token:
        return _Token("end", "") if self.at_end else self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._peek()
        self._next += 1
        if token.kind == "end":
            raise self._unreadable()
        return token

    def _accept(self, text: str) -> bool:
        token = self._peek()
        if token.text != text or token.kind == "text":
            return False
        self._next += 1
        return True

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            raise self._unreadable()

    def _unreadable(self) -> ConditionError:
        return ConditionError(f"{self._text[:200]!r} is no condition that can be checked")


def _number(text: str) -> int | float:
    if len(text) > _DIGITS:
        raise ConditionError(f"a number of {len(text)} digits")
    return int(text) if text.isdigit() else float(text)


def _plain(value: Any) -> Any:
    """A value that a condition is about; a tensor has sizes and a dtype, and equals nothing else."""
    if isinstance(value, Tensor):
        raise UnfitOperandError
    return value


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise UnfitOperandError
    return value


def _sizes(value: Any, *, strides: bool) -> Any:
    tensor = _tensor(value)
    return tensor.stride() if strides else tensor.size()
