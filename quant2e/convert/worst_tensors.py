"""The worst tensors: those that lose most to rounding and clipping, with a coarse histogram and the chosen range.

The expected squared error of a grid is computed from the exact counts of the observer's histogram
(`quant2e.ranges.quantization_error`), so no data is run again. Tensors whose observer keeps no histogram, and those
with a scale per channel, are not among them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.observers.base import inner_observer, observed
from quant2e.observers.encodings import Encoding, PerTensorEncoding
from quant2e.observers.given import has_given
from quant2e.ranges.histogram import HistogramState
from quant2e.ranges.qparams import NumberFormat
from quant2e.ranges.quantization_error import Filling, expected, filling
from quant2e.ranges.sqnr import sqnr_db
from quant2e.report.tensor_range import BINS, MOST_TENSORS, TensorRange


def worst_tensors(
    gm: GraphModule, calls: list[Node], encodings: Mapping[str, Encoding | None]
) -> tuple[TensorRange, ...]:
    """The tensors of ``calls``, the observer calls of ``gm``, that lose most under ``encodings``, the worst first."""
    found: dict[str, TensorRange] = {}
    for call in calls:
        name = str(call.target)
        encoding = encodings[name]
        if name in found or not isinstance(encoding, PerTensorEncoding) or has_given(gm.get_submodule(name)):
            continue
        state = getattr(inner_observer(gm.get_submodule(name)), "state", None)
        if isinstance(state, HistogramState) and not state.empty and state.min_val.dim() == 0:
            found[name] = tensor_range(*_place(call), state, encoding)
    return tuple(sorted(found.values(), key=lambda one: one.sqnr_db)[:MOST_TENSORS])


def _place(call: Node) -> tuple[str, str]:
    """The tensor, and an op that reads it where it is made by none."""
    source = observed(call)
    readers = [user for user in call.users if user.op == "call_function"]
    return source.name, readers[0].name if source.op != "call_function" and readers else ""


def tensor_range(tensor: str, reader: str, state: HistogramState, encoding: PerTensorEncoding) -> TensorRange:
    """What ``state``, of a whole tensor, and its encoding say, rounded to the digits that a reader looks at."""
    bins = filling(state)
    grid = NumberFormat(dtype=encoding.dtype, quant_min=encoding.quant_min, quant_max=encoding.quant_max)
    scale, zero = torch.tensor([encoding.scale], dtype=torch.float32), torch.tensor([encoding.zero_point])
    noise = float(expected(bins, grid, (scale, zero)))
    low = (encoding.quant_min - encoding.zero_point) * encoding.scale
    high = (encoding.quant_max - encoding.zero_point) * encoding.scale
    outside = (bins.edges[1:] <= low - encoding.scale / 2) | (bins.edges[:-1] >= high + encoding.scale / 2)
    total = float(bins.count.sum())
    return TensorRange(
        tensor=tensor,
        reader=reader,
        low=_digits(float(state.min_val)),
        high=_digits(float(state.max_val)),
        range_low=_digits(low),
        range_high=_digits(high),
        levels=encoding.quant_max - encoding.quant_min + 1,
        sqnr_db=round(sqnr_db(_power(bins) / total, noise), 2),
        clipped=_digits(float(bins.count[outside].sum()) / total),
        counts=coarse_counts(bins),
    )


def _power(bins: Filling) -> float:
    """Sum of squares of values that are spread evenly over their bins: the mean over [a, b] is (a² + ab + b²) / 3."""
    a, b = bins.edges[:-1], bins.edges[1:]
    return float((bins.count * (a * a + a * b + b * b) / 3).sum())


def coarse_counts(bins: Filling) -> tuple[int, ...]:
    """The counts in `BINS` bins of equal width, each fine bin counting where its middle lies."""
    low, high = bins.edges[0], bins.edges[-1]
    if not high > low:
        return (int(bins.count.sum()),)
    middle = (bins.edges[:-1] + bins.edges[1:]) / 2
    index = ((middle - low) / (high - low) * BINS).to(torch.int64).clamp(0, BINS - 1)
    counts: Tensor = torch.zeros(BINS, dtype=torch.float64).index_add_(0, index, bins.count)
    return tuple(int(count) for count in counts.tolist())


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
