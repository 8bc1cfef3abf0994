"""Quantization grids: ``x = (q - zero_point) * scale`` with ``q`` in ``quant_min..quant_max``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.graph.qdq_ops import qd

QUANTIZE_STATIC = qd.quantize_per_tensor.default
DEQUANTIZE_STATIC = qd.dequantize_per_tensor.default


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Numbers of one tensor, known before the program runs: a scale (unit:
    one step), a zero point, an integer range.
    """

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    @property
    def span(self) -> int:
        """The largest distance of an integer from the zero point."""
        return max(self.quant_max - self.zero_point, self.zero_point - self.quant_min)

    def quantize(self, x: Tensor) -> Tensor:
        """Integers of a float tensor, by the formula of ``quantize_per_tensor``:
        ``round(x * (1 / scale))``, ties to even.
        """
        steps = torch.round(x.to(torch.float32) * (1.0 / self.scale)) + self.zero_point
        return torch.clamp(steps, self.quant_min, self.quant_max).to(self.dtype)

    def bound(self, value: float) -> int:
        """The integer of one float bound; infinities give the end of the range."""
        if math.isinf(value):
            return self.quant_max if value > 0 else self.quant_min
        return int(self.quantize(torch.tensor(float(value))))

    def dequantize(self, q: Tensor) -> Tensor:
        """Floats of an integer tensor, by the formula of ``dequantize_per_tensor``."""
        return (q.to(torch.float32) - self.zero_point) * self.scale


def grid_of(node: Node) -> Grid | None:
    """The grid that a static per-tensor quantize or dequantize node names; None for other nodes."""
    if node.target not in (QUANTIZE_STATIC, DEQUANTIZE_STATIC):
        return None
    scale, zero_point, low, high, dtype = (operand(node, i) for i in range(1, 6))
    if not isinstance(scale, float) or not isinstance(zero_point, int):
        return None
    return Grid(scale=scale, zero_point=zero_point, quant_min=low, quant_max=high, dtype=dtype)
