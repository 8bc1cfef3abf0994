"""Range search: the methods (mse, percentile, entropy, minmax) that turn counts into a quantization range.

Every method works for any number of bits and for symmetric and affine grids, on the same state, so that a range can
be derived again with another method without running data again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from quant2e.errors import AnnotationError
from quant2e.ranges.clipping import products, promising
from quant2e.ranges.histogram import HistogramState
from quant2e.ranges.qparams import NumberFormat
from quant2e.ranges.quantization_error import Filling, fillings, reference

_EVERYWHERE = tuple(i / 8 for i in range(1, 9))
_CLOSE = tuple(1 + i / 32 for i in range(-1, 2))
_CLOSER = tuple(1 + i / 96 for i in range(-1, 2))
"""Factors tried on the bounds: both together over the whole range, each around the promising one, and then the best."""

_AT_A_TIME = 1 << 13
"""Bins of all histograms that are searched together: with 17 candidates the temporaries stay in the cache."""

_KNOWN: ContextVar[Mapping[tuple[int, NumberFormat], tuple[Tensor, Tensor]] | None] = ContextVar("known", default=None)
"""Ranges found already, by the identity of the counts; see `searched_together`."""


def minmax(state: HistogramState) -> tuple[float, float]:
    """The exact extremes."""
    return float(state.min_val), float(state.max_val)


def magnitudes(state: HistogramState) -> tuple[Tensor, float]:
    """Counts of ``|x|``, int64, in at most as many bins of equal width, from zero to the largest one;
    and that width.
    """
    win = state.windows
    width, used = float(win.width), torch.nonzero(state.histogram.cpu()).flatten()
    number = (used + win.first.cpu()).abs()
    while int(number.max()) >= state.histogram.numel():  # the window begins far from zero
        number, width = number >> 1, width * 2
    folded = torch.zeros(int(number.max()) + 1, dtype=torch.int64)
    return folded.index_add_(0, number, state.histogram.cpu()[used]), width


def _clip(state: HistogramState, threshold: float) -> tuple[float, float]:
    low, high = float(state.min_val), float(state.max_val)
    return max(low, min(-threshold, high)), min(high, max(threshold, low))


def percentile_range(state: HistogramState, percentile: float) -> tuple[float, float]:
    """The smallest threshold ``T``, an edge of a bin, with at least ``percentile`` % of the values within ``[-T, T]``.

    As the percentile calibrator of NVIDIA's pytorch-quantization (arXiv:2004.09602, section 4.1). The range is
    ``[-T, T]`` cut to the data.
    """
    counts, width = magnitudes(state)
    cumulative = torch.cumsum(counts, 0)
    wanted = percentile / 100 * int(cumulative[-1])
    index = int(torch.searchsorted(cumulative.to(torch.float64), wanted))
    return _clip(state, (index + 1) * width)


def _levels(state: HistogramState, grid: NumberFormat) -> int:
    """Integers available to the magnitudes of the data: all of an affine grid if one-sided, else half of them."""
    levels = grid.quant_max - grid.quant_min + 1
    one_sided = float(state.min_val) >= 0 or float(state.max_val) <= 0
    return levels if one_sided and not grid.symmetric else levels // 2


def divergences(counts: Tensor, levels: int) -> Tensor:
    """Kullback-Leibler divergence KL(P || Q) in nats of clipping after bin ``i``, for ``i = levels .. len(counts)``.

    ``counts``: int64 ``[bins]``. P is the histogram cut to ``i`` bins, the rest added to its last bin; Q is the cut
    histogram merged into ``levels`` groups and spread again evenly over the non-empty bins of each group; both are
    normalised. S. Migacz, "8-bit Inference with TensorRT", GTC 2017. Infinite where Q is 0 and P is not.
    Bin ``j`` belongs to group ``j * levels // i``.
    """
    ends = torch.arange(levels, counts.numel() + 1)
    zero = torch.zeros(1, dtype=torch.float64)
    total = counts.sum().to(torch.float64)
    mass = torch.cat([zero, torch.cumsum(counts, 0).to(torch.float64)])
    filled = torch.cat([zero, torch.cumsum(counts > 0, 0).to(torch.float64)])
    self_information = torch.cat([zero, torch.cumsum(torch.special.xlogy(counts.double(), counts.double()), 0)])
    kept = mass[ends]
    outliers = total - kept
    last = counts[ends - 1].to(torch.float64)
    last_p = last + outliers
    # Group g starts at the first bin j with j * levels >= g * i.
    starts = (torch.arange(levels + 1)[None, :] * ends[:, None] + levels - 1) // levels
    group = mass[starts].diff(dim=1)
    spread = group / filled[starts].diff(dim=1).clamp(min=1)
    p_log_p = self_information[ends - 1] + torch.special.xlogy(last_p, last_p)
    p_log_q = torch.special.xlogy(group, spread).sum(1) + torch.special.xlogy(outliers, spread[:, -1])
    # KL of the normalised pair: P sums to the total, Q to what was kept.
    divergence = (p_log_p - p_log_q) / total - torch.log(total) + torch.log(kept)
    return torch.where((last == 0) & (outliers > 0), float("inf"), divergence)


def entropy(state: HistogramState, grid: NumberFormat) -> tuple[float, float]:
    """The threshold on ``|x|`` that loses the least information, see `divergences`; the range is cut to the data.

    As in NVIDIA's calibrator the bin of zero counts as much as the one after it: zero is exact on every grid, and a
    relu's many zeros would hide the rest.
    """
    counts, width = magnitudes(state)
    levels = _levels(state, grid)
    if counts.numel() <= levels:
        return minmax(state)
    counts[0] = counts[1]
    best = int(torch.argmin(divergences(counts, levels)))
    return _clip(state, (levels + best) * width)


def mse(state: HistogramState, grid: NumberFormat) -> tuple[float, float]:
    """The range whose quantization error, squared and averaged over the data, is smallest.

    A cheap estimate (`clipping`) says where to look; candidates around that, each rounded to the scale and zero point
    it would really get, are compared on every bin. Where the counts leave open what a candidate does to the data it
    counts against the candidate (see `quantization_error.Reference`), so the result is never worse than `minmax` on
    the histogram.
    """
    low, high = mse_ranges([state], grid)[0].tolist()
    return low, high


def mse_ranges(states: Sequence[HistogramState], grid: NumberFormat) -> Tensor:
    """What `mse` finds for each of ``states``, of the same number of bins: float64 ``[states, 2]``, on the CPU.

    Bit for bit as one by one: no number depends on which histograms are searched together, and each is cut to a
    number of bins that depends on itself only.
    """
    result = torch.empty(len(states), 2, dtype=torch.float64)
    used = torch.stack([state.histogram.cpu() for state in states]) != 0
    first = used.to(torch.int8).argmax(1)
    size = used.shape[1] - used.flip(1).to(torch.int8).argmax(1) - first
    alike: dict[tuple[bool, int], list[int]] = {}
    for i, (state, n) in enumerate(zip(states, size.tolist(), strict=True)):
        one_sided = float(state.min_val) >= 0 or float(state.max_val) <= 0
        alike.setdefault((grid.symmetric or one_sided, 1 << (n - 1).bit_length()), []).append(i)
    for (together, n), members in alike.items():
        for part in torch.tensor(members).split(max(1, _AT_A_TIME // n)):
            chosen = [states[i] for i in part.tolist()]
            result[part] = _mse_ranges(chosen, fillings(chosen, first[part].tolist(), n), grid, together)
    return result


def _mse_ranges(states: Sequence[HistogramState], bins: Filling, grid: NumberFormat, together: bool) -> Tensor:
    best = torch.tensor([minmax(state) for state in states], dtype=torch.float64)
    low, high = best[:, :1].clamp(max=0), best[:, 1:].clamp(min=0)
    mark = reference(bins, grid, grid.qparams(low, high))
    lows, highs = _products(promising(bins, grid, low, high, together), _CLOSE, together)
    everywhere = torch.tensor(_EVERYWHERE, dtype=torch.float64)
    lows, highs = torch.cat([lows, low * everywhere], 1), torch.cat([highs, high * everywhere], 1)
    gain = torch.zeros(len(states), 1, dtype=torch.float64)
    for _ in range(2):
        lows, highs = torch.maximum(lows, low).clamp(max=0), torch.minimum(highs, high).clamp(min=0)
        gains = mark.advantage(grid.qparams(lows, highs))
        pick = torch.argmax(gains, 1, keepdim=True)
        around, found = (lows.gather(1, pick), highs.gather(1, pick)), gains.gather(1, pick)
        best = torch.where(found > gain, torch.cat(around, 1), best)
        gain = torch.maximum(gain, found)
        lows, highs = _products(around, _CLOSER, together)
    return best


def _products(around: tuple[Tensor, Tensor], factors: tuple[float, ...], together: bool) -> tuple[Tensor, Tensor]:
    return products(*around, torch.tensor(factors, dtype=torch.float64), together)


METHODS = ("minmax", "percentile", "mse", "entropy")


def check_method(method: str, percentile: float) -> None:
    """Raise `AnnotationError` unless ``method`` is one of `METHODS` and ``0 < percentile <= 100``."""
    if method not in METHODS:
        raise AnnotationError(f"method={method!r}: choose one of {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise AnnotationError(f"percentile={percentile}: a percentage above 0, at most 100")


def search(
    state: HistogramState, grid: NumberFormat, method: str = "mse", percentile: float = 99.99
) -> tuple[Tensor, Tensor]:
    """The range ``(min, max)``, within the data, that ``method`` finds for the integers of ``grid``.

    Float32, a scalar or, per channel or group, of their shape.
    ``percentile`` matters to that method only. Raises `AnnotationError` for an unknown method.
    """
    check_method(method, percentile)
    found = _KNOWN.get() if method == "mse" else None
    if found is not None and (known := found.get((id(state.histogram), grid))) is not None:
        return known
    device = state.min_val.device
    if state.min_val.dim() == 0:
        low, high = _search(state, grid, method, percentile)
        return torch.tensor(low, dtype=torch.float32, device=device), torch.tensor(
            high, dtype=torch.float32, device=device
        )
    if method == "mse":
        bounds = mse_ranges(state.rows(), grid).to(device, torch.float32).reshape(*state.min_val.shape, 2)
    else:
        rows = [_search(row, grid, method, percentile) for row in state.rows()]
        bounds = torch.tensor(rows, dtype=torch.float32, device=device).reshape(*state.min_val.shape, 2)
    return bounds[..., 0], bounds[..., 1]


@contextmanager
def searched_together(wanted: Sequence[tuple[HistogramState, NumberFormat]]) -> Iterator[None]:
    """Search the least squared error for many whole tensors at once; inside, `search` hands out what was found.

    It knows a state by its ``histogram``, the tensor itself, which must not change meanwhile. A block inside another
    one searches only what that has not.
    """
    known = dict(_KNOWN.get() or {})
    batches: dict[tuple[int, NumberFormat], list[HistogramState]] = {}
    for state, grid in wanted:
        if (id(state.histogram), grid) not in known:
            batches.setdefault((state.histogram.numel(), grid), []).append(state)
    for (_, grid), states in batches.items():
        for state, bounds in zip(states, mse_ranges(states, grid), strict=True):
            low, high = bounds.to(state.min_val.device, torch.float32).unbind()
            known[id(state.histogram), grid] = low, high
    before = _KNOWN.set(known)
    try:
        yield
    finally:
        _KNOWN.reset(before)


def _search(state: HistogramState, grid: NumberFormat, method: str, percentile: float) -> tuple[float, float]:
    if method == "percentile":
        return percentile_range(state, percentile)
    if method == "mse":
        return mse(state, grid)
    if method == "entropy":
        return entropy(state, grid)
    return minmax(state)
