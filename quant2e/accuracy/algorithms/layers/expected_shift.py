"""Expected shift: what the rounding of a weight does to the mean of a layer's output, from the mean of its input.

    E[ŷ] - E[y] = (ŵ - w) E[x]

Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv:1906.04721, section 4.2 and appendix C. Of a convolution, summed over its kernel, as if it had no padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.accuracy.algorithms.layers.biased_layers import CONVOLUTIONS
from quant2e.graph.dataflow import operand
from quant2e.observers.base import observed
from quant2e.passes.fold_batch_norm import GENERAL, NORMALIZED, TRANSPOSED

aten = torch.ops.aten


def expected_shift(op: Node, error: Tensor, mean: Tensor) -> Tensor:
    """The shift of each output channel, float64. ``error``: ``ŵ - w``; ``mean``: of each input channel, 1-D."""
    error, mean = error.double(), mean.double()
    if op.target not in CONVOLUTIONS:
        rows = error if op.target is aten.linear.default else error.mT
        shift: Tensor = rows @ mean
        return shift
    groups = int(operand(op, "groups"))
    taps = error.flatten(2).sum(2)
    if op.target in TRANSPOSED or (op.target in GENERAL and operand(op, "transposed")):
        stride = operand(op, "stride")
        dims = error.dim() - 2
        each = list(stride) * (dims if len(stride) == 1 else 1) if isinstance(stride, list | tuple) else [stride] * dims
        parts = zip(taps.chunk(groups), mean.chunk(groups), strict=True)
        return torch.cat([means @ rows for rows, means in parts]) / float(math.prod(each))
    parts = zip(taps.chunk(groups), mean.chunk(groups), strict=True)
    return torch.cat([rows @ means for rows, means in parts])


def mean_behind_norm(source: Node) -> Tensor | None:
    """The mean of each channel of a tensor behind a folded batch norm, and a relu or clamp; None for other tensors."""
    node, bounds = observed(source), (-math.inf, math.inf)
    if (clamp := _bounds(node)) is not None:
        node, bounds = observed(node.all_input_nodes[0]), clamp
    found = node.meta.get(NORMALIZED)
    return None if found is None else mean_of_clamped_normal(found[0], found[1], *bounds)


def _bounds(node: Node) -> tuple[float, float] | None:
    if node.target in (aten.relu.default, aten.relu_.default):
        return 0.0, math.inf
    if node.target in (aten.relu6.default, aten.relu6_.default):
        return 0.0, 6.0
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        return _numbers((operand(node, "min_val"), operand(node, "max_val")))
    if node.target in (aten.clamp.default, aten.clamp_.default):
        return _numbers((operand(node, "min"), operand(node, "max")))
    return None


def _numbers(given: Sequence[Any]) -> tuple[float, float] | None:
    low, high = given
    if any(isinstance(value, Node) for value in given):
        return None
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def mean_of_clamped_normal(mean: Tensor, deviation: Tensor, low: float, high: float) -> Tensor:
    """``E[min(max(x, low), high)]`` of normal ``x``, float64.

    With ``a = (low - mean) / deviation``, ``b = (high - mean) / deviation``, and density and distribution ``f``, ``F``:
    ``mean (F(b) - F(a)) + deviation (f(a) - f(b)) + low F(a) + high (1 - F(b))``.
    """
    mean, deviation = mean.double(), deviation.double()
    normal = torch.distributions.Normal(0.0, 1.0)
    spread = deviation.clamp_min(torch.finfo(torch.float64).tiny)
    result, inside, at_low, at_high = torch.zeros_like(mean), torch.ones_like(mean), mean * 0, mean * 0
    if low > -math.inf:
        a = (low - mean) / spread
        below = normal.cdf(a)
        result, inside, at_low = result + low * below, inside - below, _density(a)
    if high < math.inf:
        b = (high - mean) / spread
        above = 1.0 - normal.cdf(b)
        result, inside, at_high = result + high * above, inside - above, _density(b)
    return result + mean * inside + deviation * (at_low - at_high)


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2.0 * math.pi)
