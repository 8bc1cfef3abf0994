"""Grids: numbers become the integers that the quantize op makes of them, bit for bit."""

import math

import pytest
import torch

from quant2e.graph.qdq_ops import qd
from quant2e.integer.arithmetic.grid import Grid

GRIDS = [
    Grid(scale=0.25, zero_point=3, quant_min=-128, quant_max=127, dtype=torch.int8),
    Grid(scale=0.1, zero_point=0, quant_min=-127, quant_max=127, dtype=torch.int8),
    Grid(scale=0.07, zero_point=128, quant_min=0, quant_max=255, dtype=torch.uint8),
    Grid(scale=1.0, zero_point=0, quant_min=0, quant_max=127, dtype=torch.uint8),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_constants_become_the_integers_of_the_op(grid):
    steps = torch.tensor([-1000.0, -2.5, -1.5, -0.6, -0.4, 0.0, 0.4, 0.5, 0.6, 1.5, 2.5, 1000.0])
    x = torch.cat([steps * grid.scale, torch.linspace(-30, 30, 97)])
    numbers = (grid.scale, grid.zero_point, grid.quant_min, grid.quant_max, grid.dtype)
    expected = qd.quantize_per_tensor.default(x, *numbers)
    assert torch.equal(grid.quantize(x), expected)
    assert torch.equal(grid.dequantize(expected), qd.dequantize_per_tensor.default(expected, *numbers))
    assert [grid.bound(float(value)) for value in x] == expected.tolist()
    assert (grid.bound(math.inf), grid.bound(-math.inf)) == (grid.quant_max, grid.quant_min)
