"""Families of ATen ops that the tables of several backends share, as patterns."""

from __future__ import annotations

import torch

from quant2e.annotation.pattern import Arg, constant, op, roots
from quantizers.kit.conditions import batched, in_eval_mode, moving_padding, not_transposed, same_dtype, unscaled

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
clamp = op(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.clip.default)

cat = op(aten.cat.default)
max_pool2d = op(aten.max_pool2d.default)
avg_pool2d = op(aten.avg_pool2d.default)
adaptive_avg_pool2d = op(aten.adaptive_avg_pool2d.default)
mean = op(aten.mean.dim)

_MOVING_PACKETS = (
    # the same values in another shape or order
    aten.view, aten._unsafe_view, aten.view_as, aten.view_copy, aten._reshape_alias, aten.reshape, aten.reshape_as,
    aten.flatten, aten.unflatten, aten.ravel, aten.permute, aten.permute_copy, aten.transpose, aten.transpose_copy,
    aten.swapaxes, aten.swapdims, aten.movedim, aten.moveaxis, aten.t, aten.t_copy, aten.numpy_T, aten.matrix_H, aten.mT,
    aten.mH, aten.adjoint, aten.squeeze, aten.squeeze_copy, aten.unsqueeze, aten.unsqueeze_copy, aten.atleast_1d,
    aten.atleast_2d, aten.atleast_3d, aten.flip, aten.fliplr, aten.flipud, aten.roll, aten.rot90, aten.channel_shuffle,
    aten.native_channel_shuffle, aten.pixel_shuffle, aten.pixel_unshuffle, aten.fft_fftshift, aten.fft_ifftshift,
    # some of the values
    aten.slice, aten.slice_copy, aten.select, aten.select_copy, aten.narrow, aten.narrow_copy, aten.diagonal,
    aten.diagonal_copy, aten.as_strided, aten.as_strided_copy, aten.index_select, aten.index, aten.gather, aten.take,
    aten.take_along_dim, aten.tril, aten.triu,
    aten.diag, aten.diagflat, aten.diag_embed, aten.linalg_diagonal,
    # values several times
    aten.expand, aten.expand_as, aten.expand_copy, aten.broadcast_to, aten.repeat, aten.tile, aten.unfold,
    aten.unfold_copy, aten.im2col, aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d,
    aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d, aten.replication_pad1d, aten.replication_pad2d,
    aten.replication_pad3d,
    # nothing at all
    aten.contiguous, aten.clone, aten.alias, aten.alias_copy, aten.detach, aten.detach_copy, aten.lift_fresh_copy,
    aten.lift,
    aten.lift_fresh, aten.positive, aten.conj, aten.conj_physical, aten.resolve_conj, aten.resolve_neg, aten.real,
)  # fmt: skip
"""Ops of one data tensor whose every overload only moves values: tests try each overload of ATen to see that the list is
right and complete."""

_SPLITTING_PACKETS = (
    aten.split, aten.split_with_sizes, aten.split_copy, aten.split_with_sizes_copy, aten.unsafe_split,
    aten.unsafe_split_with_sizes, aten.chunk, aten.unsafe_chunk, aten.unbind, aten.unbind_copy, aten.tensor_split,
    aten.hsplit, aten.vsplit, aten.dsplit,
)  # fmt: skip

moves = (
    op(*_MOVING_PACKETS, when=same_dtype)(x)
    | op(aten.pad, aten.constant_pad_nd, when=moving_padding)(x)
    | op(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default,
         when=in_eval_mode)(x)
    | op(aten.repeat_interleave.self_int, aten.repeat_interleave.self_Tensor)(x)
    | op(aten.to, aten._to_copy, aten.type_as, when=same_dtype)(x)
    | op(*_SPLITTING_PACKETS)(x)
)  # fmt: skip
"""Ops that move values without changing any: every value of the result is one of the operand's, or zero."""

MOVES = roots(moves)
"""The targets of `moves`."""
