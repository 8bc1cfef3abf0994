"""Output error: SQNR of a quantized model's outputs against the float model's, over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quant2e.graph.captured.calls import Call, call_of
from quant2e.isolation import IsolatedRandomness
from quant2e.ranges.sqnr import sqnr_db


def outputs_of(model: Callable[..., Any], call: Call, randomness: IsolatedRandomness | None = None) -> list[Any]:
    """The outputs of one call, flat, without gradients; inputs and the caller's random streams stay as they are."""
    args, kwargs = call.copied()
    with torch.no_grad(), randomness or IsolatedRandomness():
        return pytree.tree_leaves(model(*args, **kwargs))


def output_sqnr(reference: Callable[..., Any], candidate: Callable[..., Any], batches: Iterable[Any]) -> float:
    """SQNR in dB of ``candidate``'s float outputs against ``reference``'s, over all of ``batches``.

    Elements where the reference is not finite (masked scores) count only when the candidate differs there: as noise
    without bound, so the result is -inf; and so are values of the candidate that are not finite.
    """
    signal = noise = 0.0
    ours, theirs = IsolatedRandomness(), IsolatedRandomness()  # a model that draws numbers draws the same in both
    for call in map(call_of, batches):
        for a, b in zip(outputs_of(reference, call, ours), outputs_of(candidate, call, theirs), strict=True):
            if isinstance(a, Tensor) and a.is_floating_point():
                s, n = powers(a, b)
                signal, noise = signal + s, noise + n
    return sqnr_db(signal, noise)


def powers(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Sums of squares of ``a``, and of the error of ``b``; see `output_sqnr` for what is not finite."""
    a64, b64 = a.detach().double(), b.detach().double()
    finite = torch.isfinite(a64)
    if not bool(finite.all()):
        if not torch.equal(a64[~finite].nan_to_num(), b64[~finite].nan_to_num()):
            return 0.0, math.inf
        a64, b64 = a64[finite], b64[finite]
    noise = float((a64 - b64).square().sum())
    return float(a64.square().sum()), math.inf if math.isnan(noise) else noise
