"""Rewrites of a Q/DQ graph into the form a target's partitioner takes whole.

In: the GraphModule of ATen ops that ``torch.export`` gives, with ``meta["val"]`` on its nodes. Out: the same
module, rewritten in place. Each file opens with its rewrite as an equation; each rewrite says how often it applied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.fx import GraphModule

from lowering.executorch.xnnpack.legalize.activations import decompose_activations
from lowering.executorch.xnnpack.legalize.attention import plain_attention
from lowering.executorch.xnnpack.legalize.bags import decompose_embedding_bags
from lowering.executorch.xnnpack.legalize.concat import distinct_operands, lone_operands
from lowering.executorch.xnnpack.legalize.constants import fold_constants
from lowering.executorch.xnnpack.legalize.dynamic import per_row, short_group_scales, spread_weight_scale
from lowering.executorch.xnnpack.legalize.embedding import gather_then_dequantize
from lowering.executorch.xnnpack.legalize.matmul import batched_matmul
from lowering.executorch.xnnpack.legalize.movement import one_grid, quantize_moves
from lowering.executorch.xnnpack.legalize.normalization import decompose_normalizations
from lowering.executorch.xnnpack.legalize.pieces import implicit_expand, slice_pieces
from lowering.executorch.xnnpack.legalize.pooling import (
    explicit_pooling,
    keep_mean_dims,
    pad_before_average,
    pool_images,
)
from lowering.executorch.xnnpack.legalize.projection import split_projections
from lowering.executorch.xnnpack.legalize.reductions import decompose_reductions
from lowering.executorch.xnnpack.legalize.reshape import one_view
from lowering.executorch.xnnpack.legalize.scalars import tensor_operands
from lowering.executorch.xnnpack.legalize.scores import scores_in_three_dimensions
from lowering.executorch.xnnpack.legalize.select import slice_selects
from lowering.executorch.xnnpack.legalize.upsample import repeat_nearest
from quant2e.passes.dead_code import prune_unused_attributes, remove_dead_code

Rewrite = Callable[[GraphModule], int]

EXACT: tuple[Rewrite, ...] = (
    plain_attention,
    batched_matmul,
    scores_in_three_dimensions,
    decompose_normalizations,
    decompose_activations,
    pool_images,
    keep_mean_dims,
    decompose_reductions,
    decompose_embedding_bags,
    gather_then_dequantize,
    fold_constants,
    spread_weight_scale,
    pad_before_average,
    explicit_pooling,
    repeat_nearest,
    slice_pieces,
    slice_selects,
    split_projections,
    implicit_expand,
    tensor_operands,
    lone_operands,
    one_view,
    quantize_moves,
    one_grid,
    distinct_operands,
)
"""Rewrites that keep every result, bit for bit up to the order of float additions."""

DECLARED: tuple[Rewrite, ...] = (short_group_scales, per_row)
"""Rewrites that change numbers, because the target computes that way; what lowers with them says so."""


def legalize(module: GraphModule, rewrites: Sequence[Rewrite]) -> dict[str, int]:
    """Apply rewrites in order, in place; returns how often each applied, those that did not left out."""
    applied = {}
    for rewrite in rewrites:
        count = rewrite(module)
        if count:
            applied[rewrite.__name__] = count
    remove_dead_code(module)
    prune_unused_attributes(module)
    module.recompile()
    module.graph.lint()
    return applied
