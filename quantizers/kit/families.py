"""Op families that the tables of several backends share, as patterns."""

from __future__ import annotations

import torch

from quant2e.annotation.pattern import Arg, constant, op, roots
from quant2e.graph.data_movement import Effect, When, movements
from quantizers.kit.conditions import batched, in_eval_mode, moving_padding, not_transposed, same_dtype, unscaled

aten = torch.ops.aten

x, y = Arg("x"), Arg("y")
w, b = constant("w"), constant("b", optional=True)

conv1d = op(aten.conv1d.default, aten.conv1d.padding, when=batched)(x, w, b)
conv2d = op(aten.conv2d.default, aten.conv2d.padding, when=batched)(x, w, b)
convolution = op(aten.convolution.default, when=not_transposed)(x, w, b)
conv_transpose2d = op(aten.conv_transpose2d.input, when=batched)(x, w, b)
linear = op(aten.linear.default)(x, w, b)

scores = op(aten.scaled_dot_product_attention.default)(x, y)
"""Attention as one op, with its queries and keys: their product is what softmax is taken of."""

add = op(aten.add.Tensor, when=unscaled)
sub = op(aten.sub.Tensor, when=unscaled)
mul = op(aten.mul.Tensor)

relu = op(aten.relu.default)
hardtanh = op(aten.hardtanh.default, aten.relu6.default)
clamp = op(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.clip.default)

cat = op(aten.cat.default)
max_pool = op(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
avg_pool = op(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
adaptive_avg_pool = op(
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default
)
mean = op(aten.mean.dim)

_CUTS = movements(Effect.SPLIT)
_MOVES = movements() - _CUTS - movements(Effect.JOIN)

moves = (
    op(*_MOVES, when=same_dtype)(x)
    | op(*movements(when=When.PADDING), when=moving_padding)(x)
    | op(*movements(when=When.EVALUATION), when=in_eval_mode)(x)
    | op(*movements(when=When.SAME_DTYPE), when=same_dtype)(x)
    | op(*_CUTS)(x)
)
"""Ops that move the values of one tensor: every value of the result is one of the operand's, or zero.

Their table is `quant2e.graph.data_movement`.
"""

MOVES = roots(moves)
"""The targets of `moves`."""
