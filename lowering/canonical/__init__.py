"""Rewrites of a Q/DQ graph into the form a target's partitioner takes whole.

In: the GraphModule of ATen ops that ``torch.export`` gives, with ``meta["val"]`` on its nodes. Out: the same
module, rewritten in place. Each file opens with its rewrite as an equation; each rewrite says how often it applied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.fx import GraphModule

from lowering.canonical.attention import plain_attention
from lowering.canonical.concat import distinct_operands
from lowering.canonical.constants import fold_constants
from lowering.canonical.dynamic import per_row, spread_weight_scale
from lowering.canonical.edit import drop_unused
from lowering.canonical.embedding import gather_then_dequantize
from lowering.canonical.layer_norm import open_layer_norm
from lowering.canonical.movement import one_grid, quantize_moves
from lowering.canonical.pooling import explicit_pooling, keep_mean_dims
from lowering.canonical.reshape import one_view
from lowering.canonical.select import slice_selects

Rewrite = Callable[[GraphModule], int]

EXACT: tuple[Rewrite, ...] = (
    plain_attention,
    open_layer_norm,
    gather_then_dequantize,
    fold_constants,
    spread_weight_scale,
    explicit_pooling,
    keep_mean_dims,
    slice_selects,
    one_view,
    quantize_moves,
    one_grid,
    distinct_operands,
)
"""Rewrites that keep every result, bit for bit up to the order of float additions."""

DECLARED: tuple[Rewrite, ...] = (per_row,)
"""Rewrites that change numbers, because the target computes that way; what lowers with them says so."""


def canonicalise(module: GraphModule, rewrites: Sequence[Rewrite]) -> dict[str, int]:
    """Apply rewrites in order, in place; returns how often each applied, those that did not left out."""
    applied = {}
    for rewrite in rewrites:
        count = rewrite(module)
        if count:
            applied[rewrite.__name__] = count
    drop_unused(module)
    module.graph.lint()
    return applied
