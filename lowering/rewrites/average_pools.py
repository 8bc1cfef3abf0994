"""Average pools in terms of plain ones: every window inside of the padded input, every sum divided by its size.

    avg_pool(x; padding, ceil_mode, divisor)  =  avg_pool(pad(x)) · (window / divisor)

A window that hangs over the edge, in ceil mode, is divided by its part inside of the padding; torch knows this rule and
a divisor of one's own, other runtimes know neither. For sizes that are fixed the factor is a constant of one number
for each window, and one number where all windows have the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.errors import LoweringError, where
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_constant, replace
from quant2e.graph.fake_values import shape_of

aten = torch.ops.aten

_POOLS: dict[Any, tuple[int, Callable[..., Tensor]]] = {
    aten.avg_pool1d.default: (1, F.avg_pool1d),
    aten.avg_pool2d.default: (2, F.avg_pool2d),
    aten.avg_pool3d.default: (3, F.avg_pool3d),
}
"""Op → dimensions it pools over, and torch's function."""


@dataclass(frozen=True, slots=True)
class _Pool:
    """An average pool: its window, in as many dimensions as it pools over, and how it treats the edge."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool
    counts_padding: bool
    divisor: int | None

    @property
    def window(self) -> int:
        return math.prod(self.kernel)

    @property
    def is_plain(self) -> bool:
        """Whether every runtime knows it: padding counts for all windows, or for none."""
        return not self.ceil_mode and self.divisor in (None, self.window)


def plain_average_pools(module: GraphModule) -> int:
    """Rewrite average pools that are not plain; returns how many.

    Raises `LoweringError` for one whose windows depend on a size that varies.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.target in _POOLS and not (pool := _read(node)).is_plain:
            replace(node, _rewritten(module, node, pool))
            count += 1
    return count


def _read(node: Node) -> _Pool:
    dims, _ = _POOLS[node.target]

    def sizes(name: str) -> tuple[int, ...]:
        value = operand(node, name)
        listed = tuple(value) if isinstance(value, list | tuple) else (value,)
        return listed * dims if len(listed) == 1 else listed

    kernel = sizes("kernel_size")
    return _Pool(
        kernel=kernel,
        stride=sizes("stride") or kernel,
        padding=sizes("padding"),
        ceil_mode=bool(operand(node, "ceil_mode")),
        counts_padding=bool(operand(node, "count_include_pad")),
        divisor=operand(node, "divisor_override"),
    )


def _rewritten(module: GraphModule, node: Node, pool: _Pool) -> Node:
    x, dims = operand(node, 0), len(pool.kernel)
    image = shape_of(x)[-dims:]
    fixed = [size for size in image if isinstance(size, int)]
    if len(fixed) < dims and pool.ceil_mode:
        raise LoweringError(
            f"{where(node)} averages over windows that hang over the edge, of an image whose size varies: how many "
            "values each of them holds is not known in advance. Use ceil_mode=False, or fix the size of the image"
        )
    after = _overhang(pool, fixed, shape_of(node)[-dims:]) if pool.ceil_mode else pool.padding
    edges = [edge for pair in zip(pool.padding[::-1], after[::-1], strict=True) for edge in pair]
    padded = emit(node, aten.constant_pad_nd.default, x, edges, 0.0) if any(edges) else x
    target: Any = node.target
    plain = emit(node, target, padded, list(pool.kernel), list(pool.stride))
    dtype = node.meta["val"].dtype
    if pool.divisor is not None:
        factor = torch.tensor(pool.window / pool.divisor, dtype=dtype)
    else:
        factor = _factors(node, pool, fixed, edges).to(dtype)
    return emit(node, aten.mul.Tensor, plain, emit_constant(module, node, f"{node.name}_factor", factor))


def _overhang(pool: _Pool, image: Sequence[int], pooled: Sequence[Any]) -> tuple[int, ...]:
    """Padding behind each dimension, up to where its last window ends."""
    sizes = zip(image, pooled, pool.kernel, pool.stride, pool.padding, strict=True)
    return tuple(max((int(out) - 1) * step + width - size - edge, 0) for size, out, width, step, edge in sizes)


def _factors(node: Node, pool: _Pool, image: Sequence[int], edges: Sequence[int]) -> Tensor:
    """For each window, its size by what its sum is divided by."""
    _, average = _POOLS[node.target]
    ones = torch.ones(1, 1, *image, dtype=torch.float64)
    wanted = average(ones, pool.kernel, pool.stride, pool.padding, pool.ceil_mode, pool.counts_padding)
    plain = average(F.pad(ones, list(edges)), pool.kernel, pool.stride)
    return (wanted / plain)[0, 0]
