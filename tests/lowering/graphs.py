"""Small Q/DQ models, written out by hand: what enters a lowering, independent of any quantizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant2e.graph.qdq_ops import qd

Grid = tuple[float, int]
"""Scale and zero point of an int8 tensor."""


def on_grid(x: Tensor, grid: Grid, dtype: torch.dtype = torch.int8) -> Tensor:
    """Quantize and dequantize with fixed parameters."""
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    q = qd.quantize_per_tensor.default(x, grid[0], grid[1], low, high, dtype)
    return qd.dequantize_per_tensor.default(q, grid[0], grid[1], low, high, dtype)


def on_dynamic_grid(x: Tensor, chooser: object = qd.choose_qparams.tensor) -> Tensor:
    """Quantize and dequantize with parameters found at run time."""
    scale, zero_point = chooser(x, -128, 127, 2.0**-23, torch.int8)
    q = qd.quantize_per_tensor.tensor(x, scale, zero_point, -128, 127, torch.int8)
    return qd.dequantize_per_tensor.tensor(q, scale, zero_point, -128, 127, torch.int8)


def by_token(x: Tensor) -> Tensor:
    """Quantize and dequantize with a scale for each line along the last dimension, found at run time."""
    scale, zero_point = qd.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    q = qd.quantize_per_token.default(x, scale, zero_point, -128, 127, torch.int8)
    return qd.dequantize_per_token.default(q, scale, zero_point, -128, 127, torch.int8, torch.float32)


class Weight(nn.Module):
    """An int8 tensor that dequantizes when called: per channel along ``axis``, or per tensor where it is None.

    ``steps``: the largest integer. With 63, two products with 8-bit activations fit 16 bits: exact on every machine.
    """

    def __init__(self, values: Tensor, axis: int | None = 0, zero_point: int = 0, steps: int = 63) -> None:
        super().__init__()
        self.axis = axis
        dims = [d for d in range(values.dim()) if d != axis] if axis is not None else list(range(values.dim()))
        scale = values.abs().amax(dims, keepdim=True).clamp_min(1e-6) / steps
        stored = (values / scale + zero_point).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("stored", stored)
        self.register_buffer("scales", scale.flatten())
        self.register_buffer("zero_points", torch.full((scale.numel(),), zero_point, dtype=torch.int64))
        self.scale, self.zero_point = float(scale.flatten()[0]), zero_point

    def forward(self) -> Tensor:
        if self.axis is None:
            args = (self.stored, self.scale, self.zero_point, -127, 127, torch.int8)
            return qd.dequantize_per_tensor.default(*args)
        args = (self.stored, self.scales, self.zero_points, self.axis, -127, 127, torch.int8)
        return qd.dequantize_per_channel.default(*args)


class Cnn(nn.Module):
    """Stem, depthwise and pointwise convolutions, a residual, pooling, a classifier; static int8 throughout."""

    def __init__(self, axis: int | None = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = Weight(torch.randn(8, 3, 3, 3) * 0.2, axis)
        self.depthwise = Weight(torch.randn(8, 1, 3, 3) * 0.3, axis)
        self.pointwise = Weight(torch.randn(8, 8, 1, 1) * 0.3, axis)
        self.classifier = Weight(torch.randn(5, 8) * 0.3, axis)
        self.bias = nn.Parameter(torch.randn(5) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        f = torch.nn.functional
        x = on_grid(torch.relu(f.conv2d(on_grid(x, (0.03, 3)), self.stem(), stride=2, padding=1)), (0.02, -128))
        y = on_grid(torch.relu(f.conv2d(x, self.depthwise(), padding=1, groups=8)), (0.02, -128))
        y = on_grid(f.conv2d(y, self.pointwise()), (0.02, 5))
        x = on_grid(torch.relu(x + y), (0.02, -128))
        # no pair after the mean and none after the flatten: a quantizer may leave both to the lowering
        x = on_grid(x.mean([2, 3]), (0.01, -128))
        return on_grid(f.linear(x, self.classifier(), self.bias), (0.01, 0))


class Lookup(nn.Module):
    """Rows of an int8 table."""

    def __init__(self, rows: int = 50, columns: int = 8, axis: int | None = 0, zero_point: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = Weight(torch.randn(rows, columns), axis, zero_point)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, self.table())


class DynamicAttentionInput(nn.Module):
    """Three linears that share one tensor quantized at run time, as query, key and value do."""

    def __init__(self, axis: int | None = 0, chooser: object = qd.choose_qparams.tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ModuleList([Weight(torch.randn(12, 16) * 0.3, axis) for _ in range(3)])
        self.chooser = chooser

    def forward(self, x: Tensor) -> Tensor:
        x = on_dynamic_grid(x, self.chooser)
        query, key, value = (torch.nn.functional.linear(x, weight()) for weight in self.weights)
        return query * key + value
