"""Short forms: constants that only quantize and dequantize ops read, in fewer bytes and with the same values.

    integers of 4 bits                 cat([p & 15, p >> 4], axis).to(dtype) + low          two to a byte in p
    integers of 2 bits                 cat([p & 3, p >> 2 & 3, p >> 4 & 3, p >> 6], axis)   four to a byte
    one integer at all places          z.repeat(sizes)                                      zero points of zero
    integers of 8 bits                 z.to(dtype)
    float32 that is bfloat16           s.to(float32)                                        scales rounded to it

What a constant is written as follows from its values, so that nothing is lost whatever made them. In memory it is then
a `StoredTensor`, unpacked for each op that reads it; in a file its ops are part of the graph (`quant2e.storage`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from quant2e.errors import Quant2eError
from quant2e.graph.qdq_ops import qd
from quant2e.ranges.blocks import row_blocks
from quant2e.stored_tensor import OWN_WAY, StoredTensor, in_memory

aten = torch.ops.aten

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)

BYTES_OF_AN_OP = 450
"""What one more op takes in the JSON of a program, about: a constant is written shorter where that is less."""


class ShortKind(Enum):
    """How the stored values give the constant."""

    PACKED = "several integers share a byte"
    REPEATED = "one value at all places"
    CAST = "another dtype"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortForm:
    """How a constant of ``shape`` and ``dtype`` is stored in fewer bytes.

    ``bits``, ``axis``, ``low``: of packed integers, how many each takes, along which axis those of a byte lie apart,
    and what was subtracted from them. ``stored_dtype``: of what is stored.
    """

    kind: ShortKind
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored_dtype: torch.dtype
    bits: int = 8
    axis: int = 0
    low: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Sizes of what is stored."""
        if self.kind is ShortKind.REPEATED:
            return (1,)
        sizes = list(self.shape)
        sizes[self.axis] = -(-sizes[self.axis] * self.bits // 8)
        return tuple(sizes)

    @property
    def stored_bytes(self) -> int:
        """Bytes of what is stored."""
        return math.prod(self.stored_shape) * self.stored_dtype.itemsize

    @property
    def calls(self) -> tuple[tuple[Callable[..., Tensor], tuple[Any, ...]], ...]:
        """The ops that give the constant, each with the arguments behind its tensor; where integers share a byte,
        behind those that unpack it (`ops` counts both).
        """
        if self.kind is ShortKind.REPEATED:
            return ((aten.repeat.default, (list(self.shape),)),)
        if self.kind is ShortKind.CAST:
            return ((aten.to.dtype, (self.dtype,)),)
        size = self.shape[self.axis]
        cut = ((aten.slice.Tensor, (self.axis, 0, size)),) if size % (8 // self.bits) else ()
        cast = ((aten.to.dtype, (self.dtype,)),) if self.dtype is not torch.uint8 else ()
        moved = ((aten.add.Tensor, (self.low,)),) if self.low else ()
        return (*cut, *cast, *moved)

    @property
    def ops(self) -> int:
        """How many ops give the constant."""
        per = 8 // self.bits
        return len(self.calls) + (2 * per - 1 if per > 1 else 0)

    def pack(self, value: Tensor) -> Tensor:
        """What is stored of ``value``, a constant that has this form."""
        if self.kind is ShortKind.REPEATED:
            return value.reshape(-1)[:1].clone()
        if self.kind is ShortKind.CAST:
            return value.to(self.stored_dtype)
        part = self.stored_shape[self.axis]
        packed = torch.zeros(self.stored_shape, dtype=torch.uint8, device=value.device)
        for index in range(8 // self.bits):
            begin = min(index * part, self.shape[self.axis])
            digits = value.narrow(self.axis, begin, min(part, self.shape[self.axis] - begin))
            into = packed.narrow(self.axis, 0, digits.shape[self.axis])
            for rows in row_blocks(digits.shape[0], digits.numel()):
                into[rows] |= (digits[rows] - self.low).to(torch.uint8) << (self.bits * index)
        return packed

    def unpack(self, stored: Tensor) -> Tensor:
        """The constant, in memory of its own."""
        if self.kind is ShortKind.REPEATED:
            return stored.repeat(self.shape)
        if self.kind is ShortKind.CAST:
            return stored.to(self.dtype)
        made = torch.empty(self.shape, dtype=self.dtype, device=stored.device)
        for rows in row_blocks(self.shape[0], made.numel()):
            made[rows] = self.rows(stored, rows)
        return made

    def rows(self, stored: Tensor, rows: slice) -> Tensor:
        """As ``unpack``, of some rows: a slice of the first dimension, with both ends and steps of 1."""
        if self.kind is ShortKind.REPEATED:
            return stored.repeat(rows.stop - rows.start, *self.shape[1:])
        if self.kind is ShortKind.CAST:
            return stored[rows].to(self.dtype)
        size, part, mask = self.shape[self.axis], self.stored_shape[self.axis], (1 << self.bits) - 1
        first, last = (rows.start, rows.stop) if self.axis == 0 else (0, size)
        parts = []
        for index in range(8 // self.bits):
            begin, end = max(first, index * part), min(last, (index + 1) * part, size)
            if begin < end:
                held = stored if self.axis == 0 else stored[rows]
                digits = held.narrow(self.axis, begin - index * part, end - begin)
                parts.append((digits >> (self.bits * index)) & mask)
        return torch.cat(parts, self.axis).to(self.dtype).add_(self.low)


def short_form(value: Tensor, *, repeats: bool) -> ShortForm | None:
    """The short form of a constant; None where it has none, or none that is worth its ops in a file.

    ``repeats``: whether one value may stand for all, as of zero points, of which there are as many as scales.
    """
    size = value.numel() * value.itemsize
    if size < BYTES_OF_AN_OP:
        return None
    form = _of_floats(value) if value.dtype is torch.float32 else _of_integers(value, repeats=repeats)
    return form if form is not None and size - form.stored_bytes > BYTES_OF_AN_OP * form.ops else None


def _of_floats(value: Tensor) -> ShortForm | None:
    if not torch.equal(value.to(torch.bfloat16).to(torch.float32), value):
        return None
    return ShortForm(kind=ShortKind.CAST, shape=tuple(value.shape), dtype=value.dtype, stored_dtype=torch.bfloat16)


def _of_integers(value: Tensor, *, repeats: bool) -> ShortForm | None:
    if value.dtype not in INTEGERS:
        return None
    shape = tuple(value.shape)
    low, high = (int(bound) for bound in value.aminmax())
    if repeats and low == high:
        return ShortForm(kind=ShortKind.REPEATED, shape=shape, dtype=value.dtype, stored_dtype=value.dtype)
    for bits in (2, 4):
        if high - low < 1 << bits:
            axis = next((axis for axis, count in enumerate(shape) if count % (8 // bits) == 0), 0)
            return ShortForm(
                kind=ShortKind.PACKED,
                shape=shape,
                dtype=value.dtype,
                stored_dtype=torch.uint8,
                bits=bits,
                axis=axis,
                low=_origin_of(low, high, bits),
            )
    for narrow in (torch.int8, torch.uint8):
        bounds = torch.iinfo(narrow)
        if value.itemsize > 1 and bounds.min <= low and high <= bounds.max:
            return ShortForm(kind=ShortKind.CAST, shape=shape, dtype=value.dtype, stored_dtype=narrow)
    return None


def _origin_of(low: int, high: int, bits: int) -> int:
    """What is subtracted before packing: nothing, or the smallest integer of so many bits, where either will do."""
    half = 1 << (bits - 1)
    if low >= 0 and high < 2 * half:
        return 0
    return -half if -half <= low and high < half else low


@dataclass(frozen=True, slots=True, eq=False)
class Shortened:
    """Where a constant lies in its short form, in memory: the place of a `StoredTensor`."""

    form: ShortForm
    stored: Tensor

    def __str__(self) -> str:
        return f"a constant in its short form, {self.form.kind.value}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the constant."""
        return self.form.shape

    def read(self) -> Tensor:
        """The constant, in memory of its own."""
        return self.form.unpack(self.stored)

    def rows(self, rows: slice) -> Tensor:
        """Some of its rows, in memory of their own."""
        return self.form.rows(self.stored, rows)

    def written(self, by: str) -> Quant2eError:
        """The error of what would write to it."""
        return _unwritable(by, self)


@dataclass(frozen=True, slots=True, eq=False)
class Shortening:
    """What a constant that lies in memory as it is will be in its short form: that is made when it is read."""

    form: ShortForm
    value: Tensor

    def __str__(self) -> str:
        return f"the short form of a constant, {self.form.kind.value}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the short form."""
        return self.form.stored_shape

    def read(self) -> Tensor:
        """The short form, in memory of its own."""
        return self.form.pack(self.value)

    def written(self, by: str) -> Quant2eError:
        """The error of what would write to it."""
        return _unwritable(by, self)


def _unwritable(by: str, place: object) -> Quant2eError:
    return Quant2eError(
        f"{by} writes to {place}, which is read when it is needed and never changed: put a tensor in its place that "
        "holds tensor.read(), to change it"
    )


def in_short_form(value: Tensor, *, repeats: bool) -> Tensor:
    """``value`` as a `StoredTensor` that holds its short form; itself where it has none, or lies on another device."""
    if type(value) is not Tensor or value.device.type != "cpu" or not value.is_contiguous():
        return value
    form = short_form(value, repeats=repeats)
    return value if form is None else StoredTensor(Shortened(form, form.pack(value)), value.dtype)


def shortened(value: Tensor) -> Shortened | None:
    """Where ``value`` lies in its short form; None for any other tensor."""
    place = value.place if isinstance(value, StoredTensor) else None
    return place if isinstance(place, Shortened) else None


def _dequantized(
    q: StoredTensor, scales: Tensor, zero_points: Tensor | None, *others: Any, **named: Any
) -> Tensor | None:
    """``dequantize_per_channel_group`` of integers in their short form, block by block: torch's op holds them as 32-bit
    integers and as floats at once. None where groups are not those of rows.
    """
    place = shortened(q)
    if place is None or len(place.shape) != 2 or scales.dim() != 2 or scales.shape[0] != place.shape[0]:
        return None
    if zero_points is not None and zero_points.shape != scales.shape:
        return None
    op, made = qd.dequantize_per_channel_group.default, None
    scales, zero_points = in_memory(scales), in_memory(zero_points)
    for rows in row_blocks(place.shape[0], math.prod(place.shape)):
        zeros = None if zero_points is None else zero_points[rows]
        block = op(place.rows(rows).to(q.dtype), scales[rows], zeros, *others, **named)
        made = torch.empty(place.shape, dtype=block.dtype) if made is None else made
        made[rows] = block
    return made


OWN_WAY[qd.dequantize_per_channel_group.default] = _dequantized
