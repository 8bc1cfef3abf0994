"""Requantization as nodes: integers of one scale become integers of another.

float32:       saturate(round_half_even(float32(acc) * ratio) + zero_point)
fixed_point:   saturate(shift(high_half(acc * multiplier)) + zero_point), rounding twice as gemmlowp does
single:        saturate((acc * multiplier + half) >> shift + zero_point)
power_of_two:  saturate(round_half_even(acc / 2**n) + zero_point), by shifts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.integer.arithmetic.builder import Builder, NoIntegerFormError
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.requantization import Ratio, fixed_point, general_sum, power_of_two, xnnpack_sum

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Term:
    """Integers ``v`` that stand for ``v * ratio`` steps of an output.

    ``node``: int32 or int64. ``span``: the largest magnitude. ``axis``: the channel axis of 1-D ratios, out of
    ``rank``. ``narrow``: they come straight from a tensor of 8 bits. ``sign``: −1 for what is subtracted.
    """

    node: Node
    ratio: Ratio
    span: int
    axis: int | None = None
    rank: int = 0
    narrow: bool = False
    sign: int = 1


def _along(value: Tensor, term: Term) -> Tensor:
    """1-D values shaped to broadcast along the channel axis."""
    if value.dim() == 0 or term.axis is None:
        return value
    return value.reshape([-1 if i == term.axis else 1 for i in range(term.rank)])


def _operand(b: Builder, value: Tensor, term: Term, name: str) -> Node | float | int:
    """A literal for one number; a buffer for one number per channel."""
    if value.numel() == 1 and value.dim() == 0:
        return value.item()
    return b.constant(_along(value, term), name)


def saturate(b: Builder, steps: Node, grid: Grid) -> Node:
    """Integer steps from the zero point to integers of the grid."""
    if grid.zero_point:
        steps = b.call(aten.add.Tensor, steps, grid.zero_point)
    return b.cast(b.clamp(steps, grid.quant_min, grid.quant_max), grid.dtype)


def requantize(b: Builder, term: Term, grid: Grid, place: Node) -> tuple[Node, dict[str, Tensor]]:
    """One accumulator on the scale of ``grid``; also the constants, for the record.

    Raises `NoIntegerFormError` when the arithmetic cannot express the ratio.
    """
    match b.requantization:
        case "float32":
            return _by_float(b, term, grid, place)
        case "fixed_point":
            steps, constants = multiply_by_fixed_point(b, term, place)
        case "fixed_point_single_rounding":
            steps, constants = _rounding_once(b, term, place)
        case _:
            steps, constants = _by_shift(b, term, place)
    return saturate(b, steps, grid), constants


def _by_float(b: Builder, term: Term, grid: Grid, place: Node) -> tuple[Node, dict[str, Tensor]]:
    ratio = term.ratio.single
    product = b.call(aten.mul.Tensor, b.cast(term.node, torch.float32), _operand(b, ratio, term, f"{place.name}_ratio"))
    rounded = b.call(aten.round.default, product)
    low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
    steps = b.cast(b.clamp(rounded, low, high), torch.int32)
    if grid.zero_point:
        steps = b.call(aten.add.Tensor, steps, grid.zero_point)
    return b.cast(steps, grid.dtype), {"ratio": ratio}


def multiply_by_fixed_point(b: Builder, term: Term, place: Node) -> tuple[Node, dict[str, Tensor]]:
    """The ``MultiplyByQuantizedMultiplier`` of gemmlowp: int64 steps; 32-bit saturation after the left shift."""
    multiplier, exponent = fixed_point(term.ratio.exact)
    left, right = exponent.clamp(min=0), (-exponent).clamp(min=0)
    name = place.name
    if term.span * 2 ** int(left.max()) >= 2**62:
        raise NoIntegerFormError(place, f"its scale grows by {float(term.ratio.exact.max()):.3g}, beyond 64 bits")
    wide = b.cast(term.node, torch.int64)
    if bool(left.any()):
        wide = b.call(aten.mul.Tensor, wide, _operand(b, 2**left, term, f"{name}_left"))
    if term.span * 2 ** int(left.max()) >= 2**31:
        wide = b.clamp(wide, -(2**31), 2**31 - 1)
    product = b.call(aten.mul.Tensor, wide, _operand(b, multiplier, term, f"{name}_multiplier"))
    high = _shift(b, b.call(aten.add.Tensor, product, 2**30), 31)
    if bool(right.any()):
        # ties away from zero: one less for negative numbers, where anything is shifted out
        nudge = torch.where(right > 0, 2 ** (right - 1).clamp(min=0), 0)
        negative = _shift(b, high, 63)
        if not bool((right > 0).all()):
            mask = _operand(b, (right > 0).to(torch.int64), term, f"{name}_mask")
            negative = b.call(aten.mul.Tensor, negative, mask)
        high = b.call(aten.add.Tensor, high, _operand(b, nudge, term, f"{name}_nudge"))
        high = _shift(b, b.call(aten.add.Tensor, high, negative), _operand(b, right, term, f"{name}_right"))
    return high, {"multiplier": multiplier, "exponent": exponent}


def _rounding_once(b: Builder, term: Term, place: Node) -> tuple[Node, dict[str, Tensor]]:
    """TFLite with single rounding, TOSA's ``apply_scale_32`` without double rounding: ties up."""
    multiplier, exponent = fixed_point(term.ratio.exact)
    shift = 31 - exponent
    if bool((shift < 1).any()) or bool((shift > 62).any()) or term.span >= 2**31:
        raise NoIntegerFormError(
            place, f"its scale changes by {float(term.ratio.exact.max()):.3g}, beyond 62 bits of shift"
        )
    name = place.name
    product = b.call(
        aten.mul.Tensor, b.cast(term.node, torch.int64), _operand(b, multiplier, term, f"{name}_multiplier")
    )
    product = b.call(aten.add.Tensor, product, _operand(b, 2 ** (shift - 1), term, f"{name}_nudge"))
    return _shift(b, product, _operand(b, shift, term, f"{name}_shift")), {"multiplier": multiplier, "shift": shift}


def _by_shift(b: Builder, term: Term, place: Node) -> tuple[Node, dict[str, Tensor]]:
    exponent = power_of_two(term.ratio.exact)
    if exponent is None:
        worst = float(term.ratio.exact.flatten()[0])
        raise NoIntegerFormError(place, f"its scale changes by {worst:.6g}, which is not a power of two")
    left, right = exponent.clamp(min=0), (-exponent).clamp(min=0)
    if term.span * 2 ** int(left.max()) >= 2**62 or int(right.max()) > 62:
        raise NoIntegerFormError(place, f"its scale changes by 2**{int(exponent.abs().max())}, beyond 64 bits")
    wide = b.cast(term.node, torch.int64)
    if bool(left.any()):
        wide = b.call(aten.mul.Tensor, wide, _operand(b, 2**left, term, f"{place.name}_left"))
    if bool(right.any()):
        wide = _half_to_even(b, wide, right, term, place.name)
    return wide, {"exponent": exponent}


def _half_to_even(b: Builder, x: Node, right: Tensor, term: Term, name: str) -> Node:
    """``round(x / 2**right)``: half minus one, plus one where the result would be odd;
    0 and 1 bits work out as well.
    """
    by = _operand(b, right, term, f"{name}_right")
    some = (right > 0).to(torch.int64)
    odd = b.call(aten.bitwise_and.Scalar, _shift(b, x, by), 1)
    if not bool((right > 0).all()):
        odd = b.call(aten.mul.Tensor, odd, _operand(b, some, term, f"{name}_mask"))
    half = torch.where(right > 0, 2 ** (right - 1).clamp(min=0) - 1, 0)
    nudged = b.call(aten.add.Tensor, b.call(aten.add.Tensor, x, odd), _operand(b, half, term, f"{name}_half"))
    return _shift(b, nudged, by)


def _shift(b: Builder, x: Node, by: Node | float) -> Node:
    if isinstance(by, Node):
        return b.call(aten.bitwise_right_shift.Tensor, x, by)
    return b.call(aten.bitwise_right_shift.Tensor_Scalar, x, int(by)) if by else x


def weighted_sum(b: Builder, terms: Sequence[Term], grid: Grid, place: Node) -> tuple[Node, dict[str, Tensor]]:
    """The sum of terms of different scales on the scale of ``grid``. Raises `NoIntegerFormError`."""
    narrow = len(terms) == 2 and all(t.narrow for t in terms)
    if b.requantization == "fixed_point" and narrow:
        return _tflite_sum(b, terms, grid, place)
    if b.requantization == "power_of_two":
        return _aligned_sum(b, terms, grid, place)
    constants = None
    if b.requantization == "float32" and narrow:
        first, second = (float(t.ratio.single) for t in terms)
        constants = xnnpack_sum((first, second), (terms[0].sign, terms[1].sign))
    wide = torch.int64 if constants is None else torch.int32
    if constants is None:
        signed = tuple(t.ratio.exact * t.sign for t in terms)
        constants = general_sum(signed, tuple(t.span for t in terms))
    if constants is None:
        raise NoIntegerFormError(place, "the scales of its operands are too far from its own for 64 bits")
    total = _multiplied(b, terms, constants.multipliers, wide, place)
    total = b.call(aten.add.Tensor, total, 2 ** (constants.shift - 1))
    used = {f"multiplier_{i}": m for i, m in enumerate(constants.multipliers)}
    return saturate(b, _shift(b, total, constants.shift), grid), {**used, "shift": torch.tensor(constants.shift)}


def _multiplied(
    b: Builder, terms: Sequence[Term], multipliers: Sequence[Tensor], wide: torch.dtype, place: Node
) -> Node:
    total: Node | None = None
    for i, (term, multiplier) in enumerate(zip(terms, multipliers, strict=True)):
        by = _operand(b, multiplier, term, f"{place.name}_multiplier_{i}")
        part = b.call(aten.mul.Tensor, b.cast(term.node, wide), by)
        total = part if total is None else b.call(aten.add.Tensor, total, part)
    assert total is not None
    return total


def _tflite_sum(b: Builder, terms: Sequence[Term], grid: Grid, place: Node) -> tuple[Node, dict[str, Tensor]]:
    """TFLite's 8-bit addition: both operands 20 bits up, on twice the larger scale; then down to the output's."""
    twice = 2 * max(float(t.ratio.exact) for t in terms)
    constants: dict[str, Tensor] = {}
    total: Node | None = None
    for i, term in enumerate(terms):
        up = b.call(aten.mul.Tensor, b.cast(term.node, torch.int64), 2**20)
        part, used = multiply_by_fixed_point(
            b, Term(up, Ratio(term.ratio.exact / twice, term.ratio.single), term.span << 20), place
        )
        constants |= {f"{k}_{i}": v for k, v in used.items()}
        if total is None:
            total = part
        else:
            op = aten.add.Tensor if term.sign > 0 else aten.sub.Tensor
            total = b.call(op, total, part)
    assert total is not None
    down = torch.tensor(twice / 2**20, dtype=torch.float64)
    steps, used = multiply_by_fixed_point(b, Term(total, Ratio(down, down.float()), 2**30), place)
    return saturate(b, steps, grid), constants | used


def _aligned_sum(b: Builder, terms: Sequence[Term], grid: Grid, place: Node) -> tuple[Node, dict[str, Tensor]]:
    exponents = [power_of_two(t.ratio.exact) for t in terms]
    known = [e for e in exponents if e is not None]
    if len(known) < len(terms):
        raise NoIntegerFormError(place, "the scales of its operands are no powers of two apart from its own")
    lowest = min(0, *(int(e.min()) for e in known))
    if max(int(e.max()) for e in known) - lowest + max(t.span for t in terms).bit_length() > 61:
        raise NoIntegerFormError(place, "the scales of its operands are too far apart for 64 bits")
    multipliers = [t.sign * 2 ** (e - lowest) for t, e in zip(terms, known, strict=True)]
    total = _multiplied(b, terms, multipliers, torch.int64, place)
    if lowest:
        total = _half_to_even(b, total, torch.tensor(-lowest), terms[0], place.name)
    used = {f"multiplier_{i}": m for i, m in enumerate(multipliers)}
    return saturate(b, total, grid), {**used, "shift": torch.tensor(-lowest)}
