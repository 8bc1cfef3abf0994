"""Data movement: the ATen ops whose results hold their operands' values, at other places.

    f(move(x))  =  move(f(x))        for every f that works on each value alone, quantization above all

One table, one op a line. Its columns say what an op does to the places of values (`Effect`), under which condition it
only moves (`When`), and whether torch computes it on integers. What else a target needs of an op is a condition over
these columns, beside that target. An op that picks values by comparing them (maximum, pooling) is not here: it keeps an
order, and moves nothing of its own accord.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch._ops import OpOverload, OpOverloadPacket

aten = torch.ops.aten


class Effect(Enum):
    """What an op does to the places of values."""

    SAME = "the same values at the same places"
    RESHAPE = "the same values in the same order, in other sizes"
    PERMUTE = "axes change places"
    SHUFFLE = "axes are split, change places and are joined"
    REORDER = "the same values in another order"
    SLICE = "a run of places along an axis"
    SELECT = "one place of an axis, which disappears"
    PICK = "some of the values, by an index, a diagonal or strides"
    REPEAT = "values several times"
    ZEROS = "values among zeros, or zeros instead of some"
    PAD = "a border around the values"
    SPLIT = "one tensor becomes several"
    JOIN = "several tensors become one"


class When(Enum):
    """Under which condition an op only moves values."""

    ALWAYS = "always"
    EVALUATION = "in evaluation mode"
    SAME_DTYPE = "where the dtype stays"
    PADDING = "where it pads with zeros, or with the tensor's own values"


@dataclass(frozen=True, slots=True)
class Movement:
    """One line of the table.

    ``op``: an overload, or a packet for all of its overloads on tensors. Its first operand is the tensor whose values
    move; of `Effect.JOIN`, a list of them. ``integers``: torch computes it on integers of 8 and 16 bits, and what it
    does depends on the places of values alone, not on strides.
    """

    op: OpOverload | OpOverloadPacket
    effect: Effect
    when: When = When.ALWAYS
    integers: bool = True

    def overloads(self) -> Iterator[OpOverload]:
        """The overloads that graphs hold: no in-place spellings, no ``out=``, none of TorchScript's own."""
        if isinstance(self.op, OpOverload):
            yield self.op
            return
        moved = "List[Tensor]" if self.effect is Effect.JOIN else "Tensor"
        for name in self.op.overloads():
            overload: OpOverload = getattr(self.op, name)
            arguments = overload._schema.arguments
            if str(arguments[0].type) == moved and not any(a.is_out for a in arguments):
                yield overload


TABLE: tuple[Movement, ...] = (
    # the same values in the same places
    Movement(aten.contiguous, Effect.SAME),
    Movement(aten.clone, Effect.SAME),
    Movement(aten.alias, Effect.SAME),
    Movement(aten.alias_copy, Effect.SAME),
    Movement(aten.detach, Effect.SAME),
    Movement(aten.detach_copy, Effect.SAME),
    Movement(aten.lift, Effect.SAME),
    Movement(aten.lift_fresh, Effect.SAME),
    Movement(aten.lift_fresh_copy, Effect.SAME),
    Movement(aten.positive, Effect.SAME),
    Movement(aten.conj, Effect.SAME),
    Movement(aten.conj_physical, Effect.SAME),
    Movement(aten.resolve_conj, Effect.SAME),
    Movement(aten.resolve_neg, Effect.SAME),
    Movement(aten.real, Effect.SAME),
    # the same values in the same order, in other sizes
    Movement(aten.view.default, Effect.RESHAPE),
    Movement(aten.view_copy.default, Effect.RESHAPE),
    Movement(aten.view_as, Effect.RESHAPE),
    Movement(aten._unsafe_view, Effect.RESHAPE),
    Movement(aten._reshape_alias, Effect.RESHAPE, integers=False),
    Movement(aten.reshape, Effect.RESHAPE),
    Movement(aten.reshape_as, Effect.RESHAPE),
    Movement(aten.flatten, Effect.RESHAPE),
    Movement(aten.unflatten, Effect.RESHAPE),
    Movement(aten.ravel, Effect.RESHAPE),
    Movement(aten.squeeze, Effect.RESHAPE),
    Movement(aten.squeeze_copy, Effect.RESHAPE),
    Movement(aten.unsqueeze, Effect.RESHAPE),
    Movement(aten.unsqueeze_copy, Effect.RESHAPE),
    Movement(aten.atleast_1d, Effect.RESHAPE),
    Movement(aten.atleast_2d, Effect.RESHAPE),
    Movement(aten.atleast_3d, Effect.RESHAPE),
    # axes change places
    Movement(aten.permute, Effect.PERMUTE),
    Movement(aten.permute_copy, Effect.PERMUTE),
    Movement(aten.transpose, Effect.PERMUTE),
    Movement(aten.transpose_copy, Effect.PERMUTE),
    Movement(aten.swapaxes, Effect.PERMUTE),
    Movement(aten.swapdims, Effect.PERMUTE),
    Movement(aten.movedim, Effect.PERMUTE),
    Movement(aten.moveaxis, Effect.PERMUTE),
    Movement(aten.t, Effect.PERMUTE),
    Movement(aten.t_copy, Effect.PERMUTE),
    Movement(aten.numpy_T, Effect.PERMUTE),
    Movement(aten.matrix_H, Effect.PERMUTE),
    Movement(aten.mT, Effect.PERMUTE),
    Movement(aten.mH, Effect.PERMUTE),
    Movement(aten.adjoint, Effect.PERMUTE),
    # axes are split, change places and are joined
    Movement(aten.channel_shuffle, Effect.SHUFFLE),
    Movement(aten.native_channel_shuffle, Effect.SHUFFLE),
    Movement(aten.pixel_shuffle, Effect.SHUFFLE),
    Movement(aten.pixel_unshuffle, Effect.SHUFFLE),
    # the same values in another order
    Movement(aten.flip, Effect.REORDER),
    Movement(aten.fliplr, Effect.REORDER),
    Movement(aten.flipud, Effect.REORDER),
    Movement(aten.roll, Effect.REORDER),
    Movement(aten.rot90, Effect.REORDER),
    Movement(aten.fft_fftshift, Effect.REORDER),
    Movement(aten.fft_ifftshift, Effect.REORDER),
    # a run of places along an axis
    Movement(aten.slice, Effect.SLICE),
    Movement(aten.slice_copy, Effect.SLICE),
    Movement(aten.narrow, Effect.SLICE),
    Movement(aten.narrow_copy, Effect.SLICE),
    # one place of an axis, which disappears
    Movement(aten.select, Effect.SELECT),
    Movement(aten.select_copy, Effect.SELECT),
    # some values, picked by an index, a diagonal or strides
    Movement(aten.diagonal, Effect.PICK),
    Movement(aten.diagonal_copy, Effect.PICK),
    Movement(aten.linalg_diagonal, Effect.PICK),
    Movement(aten.as_strided, Effect.PICK, integers=False),
    Movement(aten.as_strided_copy, Effect.PICK, integers=False),
    Movement(aten.index_select, Effect.PICK),
    Movement(aten.index, Effect.PICK),
    Movement(aten.gather, Effect.PICK),
    Movement(aten.take, Effect.PICK),
    Movement(aten.take_along_dim, Effect.PICK),
    # values several times
    Movement(aten.expand, Effect.REPEAT),
    Movement(aten.expand_as, Effect.REPEAT),
    Movement(aten.expand_copy, Effect.REPEAT),
    Movement(aten.broadcast_to, Effect.REPEAT),
    Movement(aten.repeat, Effect.REPEAT),
    Movement(aten.tile, Effect.REPEAT),
    Movement(aten.repeat_interleave.self_int, Effect.REPEAT),
    Movement(aten.repeat_interleave.self_Tensor, Effect.REPEAT),
    Movement(aten.unfold, Effect.REPEAT),
    Movement(aten.unfold_copy, Effect.REPEAT),
    Movement(aten.im2col, Effect.REPEAT, integers=False),
    Movement(aten.upsample_nearest1d, Effect.REPEAT, integers=False),
    Movement(aten.upsample_nearest2d, Effect.REPEAT, integers=False),
    Movement(aten.upsample_nearest3d, Effect.REPEAT, integers=False),
    Movement(aten.reflection_pad1d, Effect.REPEAT),
    Movement(aten.reflection_pad2d, Effect.REPEAT),
    Movement(aten.reflection_pad3d, Effect.REPEAT),
    Movement(aten.replication_pad1d, Effect.REPEAT),
    Movement(aten.replication_pad2d, Effect.REPEAT),
    Movement(aten.replication_pad3d, Effect.REPEAT),
    # values among zeros
    Movement(aten.tril, Effect.ZEROS),
    Movement(aten.triu, Effect.ZEROS),
    Movement(aten.diag, Effect.ZEROS),
    Movement(aten.diagflat, Effect.ZEROS),
    Movement(aten.diag_embed, Effect.ZEROS),
    # a border around the values
    Movement(aten.pad, Effect.PAD, When.PADDING),
    Movement(aten.constant_pad_nd, Effect.PAD, When.PADDING),
    # one tensor becomes several
    Movement(aten.split, Effect.SPLIT),
    Movement(aten.split_copy, Effect.SPLIT),
    Movement(aten.split_with_sizes, Effect.SPLIT),
    Movement(aten.split_with_sizes_copy, Effect.SPLIT),
    Movement(aten.unsafe_split, Effect.SPLIT),
    Movement(aten.unsafe_split_with_sizes, Effect.SPLIT),
    Movement(aten.chunk, Effect.SPLIT),
    Movement(aten.unsafe_chunk, Effect.SPLIT),
    Movement(aten.unbind, Effect.SPLIT),
    Movement(aten.unbind_copy, Effect.SPLIT),
    Movement(aten.tensor_split, Effect.SPLIT),
    Movement(aten.hsplit, Effect.SPLIT),
    Movement(aten.vsplit, Effect.SPLIT),
    Movement(aten.dsplit, Effect.SPLIT),
    # several tensors become one
    Movement(aten.cat, Effect.JOIN),
    Movement(aten.concat, Effect.JOIN),
    Movement(aten.concatenate, Effect.JOIN),
    Movement(aten.stack, Effect.JOIN),
    Movement(aten.hstack, Effect.JOIN),
    Movement(aten.vstack, Effect.JOIN),
    Movement(aten.dstack, Effect.JOIN),
    Movement(aten.row_stack, Effect.JOIN),
    Movement(aten.column_stack, Effect.JOIN),
    # nothing, in evaluation mode
    Movement(aten.dropout, Effect.SAME, When.EVALUATION),
    Movement(aten.feature_dropout, Effect.SAME, When.EVALUATION),
    Movement(aten.alpha_dropout, Effect.SAME, When.EVALUATION),
    Movement(aten.feature_alpha_dropout, Effect.SAME, When.EVALUATION),
    # nothing, where the dtype stays
    Movement(aten.to, Effect.SAME, When.SAME_DTYPE),
    Movement(aten._to_copy, Effect.SAME, When.SAME_DTYPE),
    Movement(aten.type_as, Effect.SAME, When.SAME_DTYPE),
    Movement(aten.view.dtype, Effect.SAME, When.SAME_DTYPE),
    Movement(aten.view_copy.dtype, Effect.SAME, When.SAME_DTYPE),
)
"""Every op that only moves values."""


MOVEMENTS: Mapping[OpOverload, Movement] = {overload: row for row in TABLE for overload in row.overloads()}
"""Overload → its line."""


def movement(target: object) -> Movement | None:
    """The line of what a node calls; None for what is not in the table."""
    return MOVEMENTS.get(target) if isinstance(target, OpOverload) else None


def movements(*effects: Effect, when: When = When.ALWAYS, integers: bool = False) -> frozenset[OpOverload]:
    """The overloads with one of ``effects`` (any when none is given) and that condition, without in-place spellings.

    ``integers``: only those that torch computes on integers as well.
    """
    return frozenset(
        overload
        for overload, row in MOVEMENTS.items()
        if (not effects or row.effect in effects) and row.when is when and (row.integers or not integers)
    )
