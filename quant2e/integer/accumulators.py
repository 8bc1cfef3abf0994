"""Accumulator simulation: what a narrow accumulator would do to the products of an integer graph, on data.

    pairs16:  Σ saturate16(u[2i] * w[2i] + u[2i + 1] * w[2i + 1])      u: activations as u8, w: s8 (AVX2 vpmaddubsw)
    int16, int24:  every partial sum of (x - zero_point) * w is kept in that many bits

Sums run in the order of the weight in memory: input channel, then kernel position. Kernels that pack differently pair
and add differently; the final sums are the same. A transposed convolution sums, for each output, over every input
channel and kernel position, and those that meet no input count as zeros. Of two activations the second takes the place
of the weight: as s8 in ``pairs16``, without its zero point in bits. A group-wise layer has one accumulator for each
group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.errors import Quant2eError
from quant2e.integer.arithmetic.builder import Record
from quant2e.integer.report import integer_report
from quant2e.integer.trace import tensors
from quant2e.report.plain_data import plain_data

Accumulator = Literal["pairs16", "int16", "int24"]
"""A target's accumulator: 16-bit saturating pairs, or that many bits for the running sum."""

_BLOCK = 2**22


@dataclass(frozen=True, slots=True)
class Overflow:
    """What one layer's sums do in a narrow accumulator.

    ``sums``: how many the data made. ``overflowing``: of these, how many leave the range, in a pair or on the way.
    ``wrong``: how many end with another number (for bits: the whole sum does not fit, so wrapping does not help).
    ``peak``: the largest magnitude of a pair or partial sum; ``limit``: the largest the accumulator holds.
    ``worst_error``: the largest error of a sum, in units of the accumulator.
    """

    name: str
    sums: int
    overflowing: int
    wrong: int
    peak: int
    limit: int
    worst_error: int

    @property
    def headroom(self) -> float:
        """``peak / limit``: above 1, it overflows by that factor."""
        return self.peak / self.limit

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the headroom."""
        return {**plain_data(self), "headroom": self.headroom}

    def __str__(self) -> str:
        share = self.overflowing / self.sums if self.sums else 0.0
        return (
            f"{self.name}: {self.overflowing:,} of {self.sums:,} sums overflow ({share:.2%}), "
            f"{self.wrong:,} are wrong, "
            f"by up to {self.worst_error:,}; peak {self.peak:,} is {self.headroom:.2f} x the limit"
        )


def simulate_accumulator(integer: GraphModule, data: Iterable[Any], accumulator: Accumulator) -> tuple[Overflow, ...]:
    """What ``accumulator`` does to every product of an integer graph, static and dynamic, on batches of inputs.

    ``data``: as for `calibrate`. One `Overflow` for each convolution, linear layer and matrix product, in the order of
    the graph. Raises `Quant2eError` when ``integer`` is no integer graph, and for another accumulator.
    """
    if accumulator not in get_args(Accumulator):
        raise Quant2eError(f"accumulator={accumulator!r}: choose one of {', '.join(get_args(Accumulator))}")
    records = {r.name: r for r in integer_report(integer).records if _kind(r) in _PRODUCTS}
    totals = {name: Overflow(name, 0, 0, 0, 0, _limit(accumulator), 0) for name in records}
    wanted = {node for r in records.values() for node in r.inputs.values()}
    for batch in data:
        seen = tensors(integer, wanted, batch)
        for name, record in records.items():
            inputs = {role: seen[node] for role, node in record.inputs.items()}
            for rows, weight in matrices(record, inputs, accumulator):
                totals[name] = _added(totals[name], simulate(rows, weight, accumulator))
    return tuple(totals.values())


_PRODUCTS = frozenset({"linear", "matmul_weight", "convolution", "grouped_linear", "matmul"})


def _kind(record: Record) -> str:
    """The kind of product, whatever becomes of its sums."""
    return record.kind.removeprefix("dynamic_").removeprefix("float_")


def _added(so_far: Overflow, found: Overflow) -> Overflow:
    return Overflow(
        so_far.name,
        so_far.sums + found.sums,
        so_far.overflowing + found.overflowing,
        so_far.wrong + found.wrong,
        max(so_far.peak, found.peak),
        so_far.limit,
        max(so_far.worst_error, found.worst_error),
    )


def _limit(accumulator: Accumulator) -> int:
    return 2**23 - 1 if accumulator == "int24" else 2**15 - 1


def simulate(rows: Tensor, weight: Tensor, accumulator: Accumulator) -> Overflow:
    """``rows`` [M, K] times ``weight`` [K, N], int64, in a narrow accumulator; the name of the result is empty."""
    limit = _limit(accumulator)
    sums = overflowing = wrong = peak = worst = 0
    step = max(1, _BLOCK // max(weight.numel(), 1))
    for block in rows.split(step):
        products = block.unsqueeze(2) * weight  # [m, K, N]
        if accumulator == "pairs16":
            odd = products.shape[1] % 2
            padded = torch.nn.functional.pad(products, (0, 0, 0, odd))
            partial = padded[:, 0::2] + padded[:, 1::2]
            error = (partial - partial.clamp(-limit - 1, limit)).sum(1).abs()
        else:
            partial = products.cumsum(1)
            total = partial[:, -1]
            wrapped = (total + limit + 1) % (2 * (limit + 1)) - (limit + 1)
            error = (total - wrapped).abs()
        out = ((partial > limit) | (partial < -limit - 1)).any(1)
        sums += out.numel()
        overflowing += int(out.sum())
        wrong += int((error != 0).sum())
        peak = max(peak, int(partial.abs().max()))
        worst = max(worst, int(error.max()))
    return Overflow("", sums, overflowing, wrong, peak, limit, worst)


def matrices(record: Record, inputs: dict[str, Tensor], accumulator: Accumulator) -> list[tuple[Tensor, Tensor]]:
    """Rows [M, K] and weights [K, N], one pair for each group, or each matrix of a batch."""
    x, kind, attributes = inputs["x"], _kind(record), record.attributes
    zero = inputs["zero_point"].to(torch.int64) if "zero_point" in inputs else torch.tensor(attributes["zero_point"])
    # u8 activations keep their zero point, and padding is that zero point
    u8_low = 0 if x.dtype == torch.uint8 else torch.iinfo(x.dtype).min
    shift = torch.tensor(u8_low) if accumulator == "pairs16" else zero
    values = x.to(torch.int64) - shift
    if kind == "matmul":
        y = inputs["y"].to(torch.int64)
        s8_low = -128 if inputs["y"].dtype == torch.uint8 else 0
        y = y + s8_low if accumulator == "pairs16" else y - attributes["zero_point_y"]
        return _batch(values, y)
    weight = record.constants["weight"].to(torch.int64)
    if kind == "grouped_linear":
        size = attributes["group_size"]
        flat = values.reshape(-1, values.shape[-1])
        return [(r, w.t()) for r, w in zip(flat.split(size, 1), weight.split(size, 1), strict=True)]
    w_zero = torch.as_tensor(attributes["weight_zero_point"])
    if kind == "convolution":
        return _of_convolution(record, values, weight, w_zero, int((zero - shift).flatten()[0]))
    along = [-1, 1] if kind == "linear" else [1, -1]
    weight = weight - w_zero.reshape(along if w_zero.dim() else [])
    return [(values.reshape(-1, values.shape[-1]), weight.t() if kind == "linear" else weight)]


def _batch(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Matrix products of two activations, one at a time."""
    x = x.unsqueeze(0) if x.dim() == 1 else x
    y = y.unsqueeze(1) if y.dim() == 1 else y
    lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    pairs = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (x, y))
    return list(zip(*pairs, strict=True))


def _of_convolution(
    record: Record, x: Tensor, weight: Tensor, zero: Tensor, padding_value: int
) -> list[tuple[Tensor, Tensor]]:
    spatial, attributes = weight.dim() - 2, record.attributes
    transposed, groups = attributes["transposed"], attributes["groups"]
    along = [1, -1] if transposed and len(zero.flatten()) == weight.shape[1] else [-1]
    weight = weight - (zero.reshape(along + [1] * (weight.dim() - len(along))) if zero.dim() else zero)
    x = x if x.dim() == spatial + 2 else x.unsqueeze(0)
    stride, dilation = (_each(attributes[name], spatial) for name in ("stride", "dilation"))
    kernel = list(weight.shape[2:])
    if transposed:
        # the convolution that does the same: inputs apart by the stride, the kernel turned round
        x = _apart(x, stride)
        margins = _margins(attributes, kernel, dilation)
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(list(range(2, weight.dim())))
        stride, padding_value = [1] * spatial, 0
    else:
        margins = _padding(attributes["padding"], kernel, dilation)
    x = torch.nn.functional.pad(x, [side for pair in reversed(margins) for side in pair], value=padding_value)
    patches = _patches(x, kernel, stride, dilation)  # [rows, C, kernel]
    per_group, out = weight.shape[1], weight.shape[0] // groups
    return [
        (
            patches[:, g * per_group : (g + 1) * per_group].flatten(1),
            weight[g * out : (g + 1) * out].flatten(1).t(),
        )
        for g in range(groups)
    ]


def _apart(x: Tensor, stride: list[int]) -> Tensor:
    """``stride - 1`` zeros between neighbours."""
    for i, step in enumerate(stride):
        at = 2 + i
        shape = list(x.shape)
        shape[at] = (shape[at] - 1) * step + 1
        wide = x.new_zeros(shape)
        wide[(slice(None),) * at + (slice(None, None, step),)] = x
        x = wide
    return x


def _margins(attributes: dict[str, Any], kernel: list[int], dilation: list[int]) -> list[list[int]]:
    """Zeros before and after the inputs of a transposed convolution; negative where its padding crops."""
    spatial = len(kernel)
    padding, more = (_each(attributes[name], spatial) for name in ("padding", "output_padding"))
    reach = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    return [[before, before + extra] for before, extra in zip(reach, more, strict=True)]


def _padding(given: str | int | list[int], kernel: list[int], dilation: list[int]) -> list[list[int]]:
    """Padding before and after, for each dimension."""
    if not isinstance(given, str):
        return [[p, p] for p in _each(given, len(kernel))]
    totals = [d * (k - 1) if given == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    return [[total // 2, total - total // 2] for total in totals]


def _patches(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """The inputs of every output place: [rows, C, kernel positions]; ``x`` is padded."""
    spatial = len(kernel)
    for i in range(spatial):
        at = 2 + 2 * i
        places = (x.shape[at] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        index = torch.arange(places).unsqueeze(1) * stride[i] + torch.arange(kernel[i]) * dilation[i]
        x = x.index_select(at, index.flatten()).unflatten(at, (places, kernel[i]))
    order = [0, *range(2, 2 + 2 * spatial, 2), 1, *range(3, 3 + 2 * spatial, 2)]
    x = x.permute(order)
    return x.reshape(-1, x.shape[1 + spatial], math.prod(kernel))


def _each(value: Any, spatial: int) -> list[int]:
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * spatial if len(sizes) == 1 else sizes
