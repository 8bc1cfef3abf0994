"""Contents of ``.pte`` files, read without ExecuTorch: methods, what they take and return, kernels, delegates.

    Program ─▶ ExecutionPlan ─▶ values, operators, delegates, Chain ─▶ Instruction      (executorch's ``program.fbs``)

A table of a flatbuffer begins with the distance to its list of fields, which holds for each field its place in the
table, or 0; strings, vectors and tables in it are distances again. Everything is looked up within the bytes.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lowering.executorch.pte import check_structure
from lowering.executorch.runtime import DTYPES
from quant2e.errors import FileFormatError
from quant2e.report.plain_data import plain_data

_PLANS, _SEGMENTS, _NAMED = 1, 4, 7
_NAME, _VALUES, _INPUTS, _OUTPUTS, _CHAINS, _OPERATORS, _DELEGATES, _MEMORY = 0, 2, 3, 4, 5, 6, 7, 8
"""Places of fields in ``Program`` and ``ExecutionPlan``. A union takes two, its kind and its value."""

_INT, _BOOL, _DOUBLE, _TENSOR = 2, 3, 4, 5
_KERNEL, _DELEGATE = 1, 2
_MOST = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PteMethod:
    """``inputs``, ``outputs``: as text, "float32[8, 3, 32, 32]", "at most" where a size varies.

    ``delegates``: how many parts run in which backend; ``kernels``: how often which op is called outside of them;
    ``memory``: bytes that are planned for what is not constant. ``value``: of a method that returns a constant.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    delegates: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    memory: int = 0
    value: float | int | bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PteContents:
    """``methods``: those that compute; ``constants``: what methods publish that return a number. ``named_data``: keys
    of data that delegates read. ``segments``: bytes of weights and of delegates.
    """

    methods: tuple[PteMethod, ...]
    constants: dict[str, float | int | bool]
    named_data: tuple[str, ...]
    segments: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**plain_data(self)}

    def __str__(self) -> str:
        lines = []
        for method in self.methods:
            lines.append(f"method {method.name}: {', '.join(method.inputs)} -> {', '.join(method.outputs)}")
            parts = ", ".join(f"{count} × {name}" for name, count in method.delegates.items()) or "none"
            lines.append(f"  delegates: {parts}; planned memory: {method.memory:,} bytes")
            kernels = ", ".join(f"{count} × {name}" for name, count in method.kernels.items()) or "none"
            lines.append(f"  kernels beside them: {kernels}")
        lines += [f"constant {name}: {value}" for name, value in self.constants.items()]
        return "\n".join([*lines, f"weights and delegates: {self.segments:,} bytes"])


def pte_contents(content: bytes, name: str) -> PteContents:
    """What a program of ExecuTorch holds. Raises `FileFormatError`, with ``name``, for what is none, or is damaged."""
    check_structure(content, name)
    try:
        root = _Table(content, struct.unpack_from("<I", content)[0])
        methods = [_method(plan) for plan in root.tables(_PLANS)]
        named = tuple(table.text(0) for table in root.tables(_NAMED))
        segments = sum(table.number(1, "<Q") for table in root.tables(_SEGMENTS))
    except (struct.error, UnicodeDecodeError, IndexError, OverflowError) as error:
        raise FileFormatError(f"{name} is damaged: its tables cannot be read ({error})") from error
    return PteContents(
        methods=tuple(method for method in methods if method.value is None),
        constants={method.name: method.value for method in methods if method.value is not None},
        named_data=named,
        segments=segments,
    )


class _Table:
    """A table of a flatbuffer, at a place in its bytes. Raises struct.error and IndexError for what is not within."""

    def __init__(self, content: bytes, place: int) -> None:
        self._content, self._place = content, place
        self._fields = place - self._read("<i", place)
        self._length = self._read("<H", self._fields)

    def _read(self, form: str, place: int) -> Any:
        if place < 0:
            raise IndexError("a place before the first byte")
        return struct.unpack_from(form, self._content, place)[0]

    def _field(self, index: int) -> int | None:
        at = 4 + 2 * index
        offset = self._read("<H", self._fields + at) if at + 2 <= self._length else 0
        return self._place + offset if offset else None

    def number(self, index: int, form: str) -> Any:
        place = self._field(index)
        return 0 if place is None else self._read(form, place)

    def _target(self, place: int) -> int:
        return place + int(self._read("<I", place))

    def table(self, index: int) -> _Table | None:
        place = self._field(index)
        return None if place is None else _Table(self._content, self._target(place))

    def text(self, index: int) -> str:
        place = self._field(index)
        if place is None:
            return ""
        start = self._target(place)
        end = start + 4 + self._read("<I", start)
        if end > len(self._content):
            raise IndexError("a text that ends behind the last byte")
        return self._content[start + 4 : end].decode("utf-8")

    def _vector(self, index: int, width: int) -> tuple[int, int]:
        """Where the items of a vector begin, and how many there are."""
        place = self._field(index)
        if place is None:
            return 0, 0
        start = self._target(place)
        count = int(self._read("<I", start))
        if count > _MOST or start + 4 + count * width > len(self._content):
            raise IndexError("a list that ends behind the last byte")
        return start + 4, count

    def tables(self, index: int) -> Iterator[_Table]:
        start, count = self._vector(index, 4)
        for place in range(start, start + 4 * count, 4):
            yield _Table(self._content, self._target(place))

    def numbers(self, index: int, form: str) -> tuple[int, ...]:
        width = struct.calcsize(form)
        start, count = self._vector(index, width)
        return struct.unpack_from(f"<{count}{form}", self._content, start)


def _method(plan: _Table) -> PteMethod:
    values = list(plan.tables(_VALUES))
    operators = [f"{op.text(0)}.{op.text(1)}".removesuffix(".") for op in plan.tables(_OPERATORS)]
    backends = [delegate.text(0) for delegate in plan.tables(_DELEGATES)]
    calls = [call for chain in plan.tables(_CHAINS) for call in _calls(chain)]
    outputs = [values[index] for index in plan.numbers(_OUTPUTS, "i")]
    inputs = tuple(_shown(values[index]) for index in plan.numbers(_INPUTS, "i"))
    constant = outputs[0] if len(outputs) == 1 and not calls and not inputs else None
    return PteMethod(
        name=plan.text(_NAME),
        inputs=inputs,
        outputs=tuple(map(_shown, outputs)),
        delegates=dict(Counter(backends[index] for kind, index in calls if kind == _DELEGATE)),
        kernels=dict(Counter(operators[index] for kind, index in calls if kind == _KERNEL)),
        memory=sum(plan.numbers(_MEMORY, "q")),
        value=None if constant is None else _number(constant),
    )


def _calls(chain: _Table) -> Iterator[tuple[int, int]]:
    """Kind and index of each call of a kernel or a delegate."""
    for instruction in chain.tables(2):
        call, kind = instruction.table(1), instruction.number(0, "<B")
        if call is not None and kind in (_KERNEL, _DELEGATE):
            index = call.number(0, "<i")
            if index < 0:
                raise IndexError("a call of nothing")
            yield kind, index


def _shown(value: _Table) -> str:
    kind, held = value.number(0, "<B"), value.table(1)
    if kind != _TENSOR or held is None:
        return {_INT: "int", _BOOL: "bool", _DOUBLE: "float"}.get(kind, "value")
    number = held.number(0, "<b")
    dtype = str(DTYPES[number]).removeprefix("torch.") if number in DTYPES else f"dtype {number}"
    varies = " at most" if held.number(8, "<b") else ""
    return f"{dtype}[{', '.join(map(str, held.numbers(2, 'i')))}]{varies}"


def _number(value: _Table) -> float | int | bool | None:
    """The number that a value holds; None for another value."""
    kind, held = value.number(0, "<B"), value.table(1)
    forms = {_INT: "<q", _BOOL: "<?", _DOUBLE: "<d"}
    if kind not in forms or held is None:
        return None
    found: float | int | bool = held.number(0, forms[kind])
    return found if math.isfinite(found) else None
