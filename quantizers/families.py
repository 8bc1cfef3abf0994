"""Families of ATen ops that the tables of several backends share, as patterns."""

from __future__ import annotations

import torch

from quant2e.pattern import Arg, constant, op
from quantizers.conditions import batched, in_eval_mode, not_transposed, same_dtype, unscaled, zero_padding

aten = torch.ops.aten

x, y = Arg("x"), Arg("y")
w, b = constant("w"), constant("b", optional=True)

conv1d = op(aten.conv1d.default, aten.conv1d.padding, when=batched)(x, w, b)
conv2d = op(aten.conv2d.default, aten.conv2d.padding, when=batched)(x, w, b)
convolution = op(aten.convolution.default, when=not_transposed)(x, w, b)
conv_transpose2d = op(aten.conv_transpose2d.input, when=batched)(x, w, b)
linear = op(aten.linear.default)(x, w, b)

add = op(aten.add.Tensor, when=unscaled)
sub = op(aten.sub.Tensor, when=unscaled)
mul = op(aten.mul.Tensor)

relu = op(aten.relu.default)
hardtanh = op(aten.hardtanh.default, aten.relu6.default)
clamp = op(aten.clamp.default)

cat = op(aten.cat.default)
max_pool2d = op(aten.max_pool2d.default)
avg_pool2d = op(aten.avg_pool2d.default)
adaptive_avg_pool2d = op(aten.adaptive_avg_pool2d.default)
mean = op(aten.mean.dim)

moves = (
    op(
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
        aten.unflatten.int, aten.permute.default, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default,
        aten.movedim.int, aten.movedim.intlist, aten.t.default, aten.numpy_T.default, aten.mT.default,
        aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default, aten.expand_as.default,
        aten.broadcast_to.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
        aten.detach.default, aten.channel_shuffle.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
        aten.flip.default, aten.roll.default, aten.repeat.default,
    )(x)
    | op(aten.pad.default, aten.constant_pad_nd.default, when=zero_padding)(x)
    | op(aten.dropout.default, aten.feature_dropout.default, when=in_eval_mode)(x)
    | op(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, when=same_dtype)(x)
)  # fmt: skip
"""Ops that move values without changing any: every value of the result is one of the operand's, or zero."""
