"""What a narrow accumulator would do to the products of an integer graph, on data.

    pairs16:  Σ saturate16(u[2i] * w[2i] + u[2i + 1] * w[2i + 1])      u: activations as u8, w: s8 (AVX2 vpmaddubsw)
    int16, int24:  every partial sum of (x - zero_point) * w is kept in that many bits

Sums run in the order of the weight in memory: input channel, then kernel position. Kernels that pack differently pair
and add differently; the final sums are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.errors import Quant2eError
from quant2e.integer.build import Record
from quant2e.integer.report import integer_report
from quant2e.integer.trace import tensors

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

    def __str__(self) -> str:
        share = self.overflowing / self.sums if self.sums else 0.0
        return (
            f"{self.name}: {self.overflowing:,} of {self.sums:,} sums overflow ({share:.2%}), {self.wrong:,} are wrong, "
            f"by up to {self.worst_error:,}; peak {self.peak:,} is {self.headroom:.2f} x the limit"
        )


def simulate_accumulator(integer: GraphModule, data: Iterable[Any], accumulator: Accumulator) -> tuple[Overflow, ...]:
    """What ``accumulator`` does to every product of an integer graph with constant weights, on batches of inputs.

    ``data``: as for `calibrate`. One `Overflow` for each convolution and linear layer, in the order of the graph;
    transposed convolutions and products of two activations are not simulated. Raises `Quant2eError` when ``integer`` is
    no integer graph, and for another accumulator.
    """
    if accumulator not in get_args(Accumulator):
        raise Quant2eError(f"accumulator={accumulator!r}: choose one of {', '.join(get_args(Accumulator))}")
    records = [r for r in integer_report(integer).records if _simulated(r)]
    totals = {r.output: Overflow(r.name, 0, 0, 0, 0, _limit(accumulator), 0) for r in records}
    for batch in data:
        seen = tensors(integer, {r.inputs["x"] for r in records}, batch)
        for record in records:
            totals[record.output] = _layer(record, seen[record.inputs["x"]], accumulator, totals[record.output])
    return tuple(totals.values())


def _simulated(record: Record) -> bool:
    plain = record.kind in ("linear", "matmul_weight") or record.kind == "convolution"
    return plain and not record.attributes.get("transposed", False)


def _limit(accumulator: Accumulator) -> int:
    return 2**23 - 1 if accumulator == "int24" else 2**15 - 1


def _layer(record: Record, x: Tensor, accumulator: Accumulator, so_far: Overflow) -> Overflow:
    zero = int(record.attributes["zero_point"])
    low = 0 if accumulator != "pairs16" or x.dtype == torch.uint8 else torch.iinfo(x.dtype).min
    shift = low if accumulator == "pairs16" else zero  # u8 activations keep their zero point; padding is the zero point
    values = x.to(torch.int64) - shift
    for rows, weight in _matrices(record, values, zero - shift):
        found = simulate(rows, weight, accumulator)
        so_far = Overflow(
            so_far.name,
            so_far.sums + found.sums,
            so_far.overflowing + found.overflowing,
            so_far.wrong + found.wrong,
            max(so_far.peak, found.peak),
            so_far.limit,
            max(so_far.worst_error, found.worst_error),
        )
    return so_far


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


def _matrices(record: Record, x: Tensor, padding_value: int) -> list[tuple[Tensor, Tensor]]:
    """Rows [M, K] and weights [K, N] of a layer, one pair for each group."""
    weight = record.constants["weight"].to(torch.int64)
    zero = torch.as_tensor(record.attributes["weight_zero_point"])
    if record.kind != "convolution":
        weight = weight if record.kind == "matmul_weight" else weight.t()
        return [(x.reshape(-1, x.shape[-1]), weight - zero)]
    spatial = weight.dim() - 2
    weight = weight - zero.reshape([-1, *[1] * (spatial + 1)])
    x = x if x.dim() == spatial + 2 else x.unsqueeze(0)
    groups = record.attributes["groups"]
    patches = _patches(record, x, list(weight.shape[2:]), padding_value)  # [rows, C, kernel]
    per_group, out = weight.shape[1], weight.shape[0] // groups
    return [
        (
            patches[:, g * per_group : (g + 1) * per_group].flatten(1),
            weight[g * out : (g + 1) * out].flatten(1).t(),
        )
        for g in range(groups)
    ]


def _patches(record: Record, x: Tensor, kernel: list[int], padding_value: int) -> Tensor:
    """The inputs of every output place: [rows, C, kernel positions]."""
    spatial = len(kernel)
    stride, dilation = (_each(record.attributes[name], spatial) for name in ("stride", "dilation"))
    given = record.attributes["padding"]
    before_after: list[int] = []
    for i in reversed(range(spatial)):
        total = dilation[i] * (kernel[i] - 1)
        pads = (total // 2, total - total // 2) if given == "same" else (0, 0)
        before_after += pads if isinstance(given, str) else [_each(given, spatial)[i]] * 2
    x = torch.nn.functional.pad(x, before_after, value=padding_value)
    for i in range(spatial):
        at = 2 + 2 * i
        places = (x.shape[at] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        index = torch.arange(places).unsqueeze(1) * stride[i] + torch.arange(kernel[i]) * dilation[i]
        x = x.index_select(at, index.flatten()).unflatten(at, (places, kernel[i]))
    order = [0, *range(2, 2 + 2 * spatial, 2), 1, *range(3, 3 + 2 * spatial, 2)]
    x = x.permute(order)
    return x.reshape(-1, x.shape[1 + spatial], _product(kernel))


def _each(value: Any, spatial: int) -> list[int]:
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * spatial if len(sizes) == 1 else sizes


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
