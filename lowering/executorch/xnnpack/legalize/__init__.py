"""XNNPACK's legal form: a Q/DQ graph in the ops that its partitioner takes whole.

In: the GraphModule of ATen ops that ``torch.export`` gives, with ``meta["val"]`` on its nodes. Out: the same
module, rewritten in place. Each file opens with its rewrite as an equation; each rewrite says how often it applied.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from lowering.executorch.xnnpack.legalize.attention import plain_attention
from lowering.executorch.xnnpack.legalize.attention_scores import scores_in_three_dimensions
from lowering.executorch.xnnpack.legalize.data_movement import dequantized_by_reader, one_grid, quantize_moves
from lowering.executorch.xnnpack.legalize.dynamic_quantization import (
    per_image,
    per_row,
    short_group_scales,
    spread_weight_scale,
)
from lowering.executorch.xnnpack.legalize.matmul import batched_matmul, batched_matrices, rows_of_linear
from lowering.executorch.xnnpack.legalize.padding import closed_pads, crops_as_slices
from lowering.executorch.xnnpack.legalize.pointwise import decompose_activations, tensor_operands
from lowering.executorch.xnnpack.legalize.pooling import (
    explicit_pooling,
    keep_mean_dims,
    pad_before_average,
    pool_images,
)
from lowering.executorch.xnnpack.legalize.projection import split_projections
from lowering.executorch.xnnpack.legalize.reductions import decompose_normalizations, decompose_reductions
from lowering.executorch.xnnpack.legalize.reshape import (
    full_rank_constants,
    full_rank_operands,
    one_view,
    quantized_numbers,
)
from lowering.executorch.xnnpack.legalize.slicing import few_slices, plain_spellings, windows_as_places
from lowering.executorch.xnnpack.legalize.split_and_join import (
    distinct_operands,
    implicit_expand,
    lone_operands,
    slice_selects,
    slices_and_joins,
)
from lowering.rewrites import apply
from lowering.rewrites.constants import fold_constants
from lowering.rewrites.embedding import gather_then_dequantize
from lowering.rewrites.embedding_bag import decompose_embedding_bags
from lowering.rewrites.experts import EXPERTS
from lowering.rewrites.layouts import PLAIN_LAYOUTS
from lowering.rewrites.ranges import plain_ranges
from quant2e.passes import Pass, Promise

EXACT: tuple[Pass, ...] = (
    *PLAIN_LAYOUTS,
    plain_spellings,
    plain_ranges,
    plain_attention,
    batched_matmul,
    batched_matrices,
    rows_of_linear,
    scores_in_three_dimensions,
    decompose_normalizations,
    decompose_activations,
    pool_images,
    keep_mean_dims,
    decompose_reductions,
    *EXPERTS,
    decompose_embedding_bags,
    gather_then_dequantize,
    fold_constants,
    spread_weight_scale,
    pad_before_average,
    crops_as_slices,
    explicit_pooling,
    quantized_numbers,
    slices_and_joins,
    slice_selects,
    split_projections,
    implicit_expand,
    windows_as_places,
    few_slices,
    tensor_operands,
    full_rank_operands,
    full_rank_constants,
    lone_operands,
    one_view,
    quantize_moves,
    one_grid,
    closed_pads,
    distinct_operands,
    dequantized_by_reader,
)
"""Rewrites that keep every result, bit for bit up to the order of float additions."""

DECLARED: tuple[Pass, ...] = (short_group_scales, per_row)
"""Rewrites that change numbers, because the target computes that way; what lowers with them says so."""

SPELLED: tuple[Pass, ...] = (per_image,)
"""Rewrites that say something else than the target computes, because its partitioner knows no other spelling."""


_SHARED = frozenset({"one consumer per dequantize"})
"""The partitioner gives each consumer its own."""


def legalize(module: GraphModule, rewrites: Sequence[Pass]) -> dict[str, int]:
    """Apply rewrites in order, in place; returns how often each applied, those that did not left out."""
    return apply(module, rewrites, Promise(result=rewrites not in (DECLARED, SPELLED), waived=_SHARED))
