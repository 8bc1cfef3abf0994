"""Rewrite pipeline for Inductor: a Q/DQ graph in the form that int8 kernels take, with the same eager result.

The rewrites run on a private copy, in the order of `REWRITES`. What Inductor would lower wrongly is kept away from its
patterns by `lowering.inductor.guard`, which runs after them.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.inductor.rewrites.broadcast import shared_values_first
from lowering.inductor.rewrites.constant_operands import constants_as_operands
from lowering.inductor.rewrites.conv1d import convolutions_in_two_dimensions
from lowering.inductor.rewrites.embedding import gathered_rows
from lowering.inductor.rewrites.fusion import idle_dropouts
from lowering.inductor.rewrites.graph import call
from lowering.inductor.rewrites.padding import numbered_padding
from lowering.inductor.rewrites.pools import pools_in_two_dimensions
from lowering.inductor.rewrites.weights import (
    ACTIVATION_DQ,
    activation_of,
    explicit_zero_points,
    float_biases,
    folded_weights,
    per_channel_weights,
    weight_of,
    weights_by_output,
)
from lowering.inductor.rewrites.written import copies_where_written
from lowering.rewrites.layouts import contiguous_constants
from quant2e.graph.attributes import tensor_at
from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.dataflow import operands
from quant2e.graph.edit import replace, take_over
from quant2e.graph.qdq_ops import CHOOSE_PER_TENSOR, CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE, qd
from quant2e.integer.functionalize import use_functional_ops
from quant2e.passes import Pass
from quant2e.passes.dead_code import remove_dead_code

aten = torch.ops.aten

MOVES = movements(Effect.SAME, Effect.RESHAPE, Effect.PERMUTE, Effect.SLICE, Effect.SELECT, integers=True)
"""What may stand behind a dequantize as well as in front of it: as many numbers are dequantized, or fewer."""

_TO_STATIC = {
    qd.quantize_per_tensor.tensor: qd.quantize_per_tensor.default,
    qd.quantize_per_tensor.tensor2: qd.quantize_per_tensor.default,
    qd.dequantize_per_tensor.tensor: qd.dequantize_per_tensor.default,
    qd.dequantize_per_tensor.tensor2: qd.dequantize_per_tensor.default,
}
_OF_TOKENS = (
    qd.choose_qparams_per_token_asymmetric.default,
    qd.quantize_per_token.default,
    qd.dequantize_per_token.default,
)
_QPARAM_NAMES = ("scale", "zero_point", "quant_min", "quant_max")


def positional_arguments(gm: GraphModule) -> int:
    """q/dq arguments given by keyword => by position, as the other rewrites expect them."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target in QUANTIZE | DEQUANTIZE | CHOOSE_QPARAMS:
            keywords = {"out_dtype": node.kwargs["out_dtype"]} if node.kwargs.get("out_dtype") is not None else {}
            args = tuple(value for name, value in operands(node).items() if name != "out_dtype")
            if args != node.args or keywords != node.kwargs:
                node.args, node.kwargs = args, keywords
                count += 1
    return count


def constant_parameters(gm: GraphModule) -> int:
    """``q/dq.tensor(x, get_attr scale, get_attr zero_point, …)`` => ``q/dq.default(x, float, int, …)``."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in _TO_STATIC:
            continue
        args = operands(node)
        for name in _QPARAM_NAMES:
            value = tensor_at(gm, args[name])
            if value is not None and value.numel() == 1:
                args[name] = value.item()
        if any(isinstance(args[name], Node) for name in _QPARAM_NAMES):
            continue
        kwargs = {"out_dtype": args["out_dtype"]} if args.get("out_dtype") is not None else {}
        with gm.graph.inserting_before(node):
            static = call(
                gm,
                node,
                _TO_STATIC[node.target],
                args["input"],
                float(args["scale"]),
                *(int(args[name]) for name in _QPARAM_NAMES[1:]),
                args["dtype"],
                **kwargs,
            )
        take_over(static, node)
        replace(node, static)
        count += 1
    return count


def unsigned_activations(gm: GraphModule) -> int:
    """``dq(q(x, s, z, int8), s, z)`` => ``dq(q(x, s, z + 128, uint8), s, z + 128)``, also with dynamic parameters.

    The same numbers, moved by 128: oneDNN's int8 convolution takes unsigned activations only and writes wrong
    integers where the output is signed, and its linear is several times faster on unsigned ones. Integers that the
    graph takes, returns or computes on keep their sign: they are moved where they enter and leave.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is qd.quantize_per_tensor.default and node.args[5] is torch.int8:
            _quantize_unsigned(gm, node)
            count += 1
        elif node.target in CHOOSE_PER_TENSOR and node.args[4] is torch.int8:
            quantizes = _parametrized(node)
            if quantizes is not None:
                node.args = (node.args[0], node.args[1] + 128, node.args[2] + 128, node.args[3], torch.uint8)
                for each in quantizes:
                    _shift(each, 3)
                count += 1
    for node in list(gm.graph.nodes):
        signed = node.target is qd.dequantize_per_tensor.default and node.args[5] is torch.int8
        if signed and tensor_at(gm, node.args[0]) is None:
            with gm.graph.inserting_before(node):
                unsigned = _moved(gm, node, node.args[0], 128, torch.uint8)
            node.args = _shifted((unsigned, *node.args[1:]), 2)
            count += 1
    return count


def _quantize_unsigned(gm: GraphModule, node: Node) -> None:
    twins = [user for user in node.users if user.target is qd.dequantize_per_tensor.default]
    others = [user for user in node.users if user not in twins]
    for each in (node, *twins):
        _shift(each, 2)
    if others:
        with gm.graph.inserting_before(node.next):
            signed = _moved(gm, node, node, -128, torch.int8)
        for user in others:
            user.replace_input_with(node, signed)


def _moved(gm: GraphModule, like: Node, integers: Node, by: int, dtype: torch.dtype) -> Node:
    wide = call(gm, like, aten.to.dtype, integers, torch.int32)
    return call(gm, like, aten.to.dtype, call(gm, like, aten.add.Tensor, wide, by), dtype)


def _shift(node: Node, first: int) -> None:
    node.args = _shifted(node.args, first)
    value = node.meta.get("val")
    if node.target in QUANTIZE and isinstance(value, torch.Tensor):
        node.meta["val"] = value.to(torch.uint8)


def _shifted(args: tuple[Any, ...], first: int) -> tuple[Any, ...]:
    """q/dq arguments with the integers from place ``first`` up to the dtype moved by 128, and the dtype unsigned."""
    return (*args[:first], *(arg + 128 for arg in args[first:5]), torch.uint8)


def _parametrized(choose: Node) -> list[Node] | None:
    """The q and dq nodes that use dynamic parameters;
    None unless they are all of that, and the integers stay inside.
    """
    found: set[Node] = {user for part in choose.users for user in part.users}
    for node in found:
        if node.target is qd.quantize_per_tensor.tensor:
            if not all(user in found and user.args[0] is node for user in node.users):
                return None
        elif node.target is not qd.dequantize_per_tensor.tensor or node.args[0] not in found:
            return None
    return sorted(found) if all(node.args[5] is torch.int8 for node in found) else None


def convert_after_dequantize(gm: GraphModule) -> int:
    """``dq(x, out_dtype=bfloat16)`` => ``dq(x).to(bfloat16)``, the form whose int8 kernels return bfloat16.

    Exact for 8-bit integers: their differences fit bfloat16 and the product is rounded once in both.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in (
            qd.dequantize_per_tensor.default,
            qd.dequantize_per_tensor.tensor,
            qd.dequantize_per_channel.default,
        ):
            continue
        out, args = node.kwargs.get("out_dtype"), operands(node)
        if out in (None, torch.float32) or args["dtype"] not in (torch.uint8, torch.int8):
            continue
        with gm.graph.inserting_before(node):
            wide = call(gm, node, node.target, *node.args)
            narrow = call(gm, node, aten.to.dtype, wide, out)
        take_over(narrow, node)
        replace(node, narrow)
        count += 1
    return count


def dynamic_parameters(gm: GraphModule) -> int:
    """``choose_qparams(x)`` => the same formula in ATen, with the range extended to hold zero.

    Inductor's own decomposition forgets zero: of an input in [5, 6] it makes integers that are wrong by 5. The
    symmetric form has no decomposition at all.
    """
    found = [n for n in gm.graph.nodes if n.target in CHOOSE_PER_TENSOR]
    for node in found:
        args = operands(node)
        low_int, high_int = int(args["quant_min"]), int(args["quant_max"])
        with gm.graph.inserting_before(node):
            both = call(gm, node, aten.aminmax.default, args["input"])
            low = call(gm, node, aten.clamp_max.default, call(gm, node, operator.getitem, both, 0), 0)
            high = call(gm, node, aten.clamp_min.default, call(gm, node, operator.getitem, both, 1), 0)
            eps = call(gm, node, aten.full.default, [1], args["eps"], dtype=torch.float32)
            if node.target is qd.choose_qparams.tensor:
                span = call(gm, node, aten.sub.Tensor, high, low)
                scale = call(gm, node, aten.div.Tensor, span, float(high_int - low_int))
                scale = call(gm, node, aten.maximum.default, scale, eps)
                steps = call(gm, node, aten.round.default, call(gm, node, aten.div.Tensor, low, scale))
                point = call(gm, node, aten.rsub.Scalar, call(gm, node, aten.to.dtype, steps, torch.int32), low_int)
                point = call(gm, node, aten.clamp.default, point, low_int, high_int)
            else:
                span = call(gm, node, aten.maximum.default, call(gm, node, aten.neg.default, low), high)
                scale = call(gm, node, aten.div.Tensor, span, float(high_int - low_int) / 2)
                scale = call(gm, node, aten.maximum.default, scale, eps)
                middle = 128 if args["dtype"] is torch.uint8 else 0
                point = call(gm, node, aten.full.default, [1], middle, dtype=torch.int64)
            scale = call(gm, node, aten.to.dtype, scale, torch.float64)
            point = call(gm, node, aten.to.dtype, point, torch.int64)
        for user in list(node.users):
            replace(user, scale if user.args[1] == 0 else point)
        gm.graph.erase_node(node)
    return len(found)


def token_parameters(gm: GraphModule) -> int:
    """Scales for each token => the same formulas in ATen, which are fused with what is around them.

    torch's own ops for tokens are Python functions: slow inside of a program, and impossible in a package.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in _OF_TOKENS:
            continue
        count += 1
        if node.target is qd.choose_qparams_per_token_asymmetric.default:
            node.target = qd._choose_qparams_per_token_asymmetric_impl.default
            continue
        args = operands(node)
        with gm.graph.inserting_before(node):
            if node.target is qd.quantize_per_token.default:
                inverse = call(gm, node, aten.reciprocal.default, args["scales"])
                steps = call(gm, node, aten.mul.Tensor, args["input"], inverse)
                steps = call(gm, node, aten.round.default, call(gm, node, aten.add.Tensor, steps, args["zero_points"]))
                steps = call(gm, node, aten.clamp.default, steps, args["quant_min"], args["quant_max"])
                made = call(gm, node, aten.to.dtype, steps, args["dtype"])
            else:
                shifted = call(gm, node, aten.sub.Tensor, args["input"], args["zero_points"])
                scaled = call(gm, node, aten.mul.Tensor, shifted, args["scales"])
                made = call(gm, node, aten.to.dtype, scaled, args["output_dtype"])
        take_over(made, node)
        replace(node, made)
    return count


def narrow_ranges(gm: GraphModule) -> int:
    """``quantize(x, quant_min, quant_max)`` => ``quantize(x).clamp(quant_min, quant_max)`` where the dtype is wider.

    Inductor clamps to the dtype, not to the range, when it quantizes with tensor parameters and when an int8
    kernel writes the integers itself.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in (qd.quantize_per_tensor.default, qd.quantize_per_tensor.tensor):
            continue
        args = operands(node)
        if args["dtype"] not in (torch.uint8, torch.int8):
            continue
        bounds, found = torch.iinfo(args["dtype"]), node
        users = list(node.users)
        place = node.next
        # minimum and maximum, not clamp: Inductor would fuse that into the int8 kernel, as if it were a float clamp
        for op, bound, widest in (
            (aten.maximum.default, args["quant_min"], bounds.min),
            (aten.minimum.default, args["quant_max"], bounds.max),
        ):
            if bound != widest:
                with gm.graph.inserting_before(place):
                    limit = call(gm, node, aten.full.default, [], bound, dtype=args["dtype"])
                    found = call(gm, node, op, found, limit)
        for user in users:
            if found is not node:
                user.replace_input_with(node, found)
        count += found is not node
    return count


def single_precision(gm: GraphModule) -> int:
    """``quantize(float16 x)`` => ``quantize(x.float())``, which is what the eager kernel does first."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in QUANTIZE or not isinstance(node.args[0], Node):
            continue
        value = node.args[0].meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype is torch.float16:
            with gm.graph.inserting_before(node):
                wide = call(gm, node, aten.to.dtype, node.args[0], torch.float32)
            node.replace_input_with(node.args[0], wide)
            count += 1
    return count


def dequantize_last(gm: GraphModule) -> int:
    """``linear(view(dq(x)), w)`` => ``linear(dq(view(x)), w)``: the kernels read integers."""
    count = 0
    for node in list(gm.graph.nodes):
        if weight_of(node) is None:
            continue
        first = source = activation_of(node)
        moves: list[Node] = []
        while isinstance(source, Node) and (source.target in MOVES or source.target is aten.to.dtype):
            moves.append(source)
            source = source.args[0] if isinstance(source.args[0], Node) else None
        if first is None or not isinstance(source, Node) or source.target not in ACTIVATION_DQ:
            continue
        conversions = [move for move in moves if move.target is aten.to.dtype]
        if moves == conversions:
            continue
        value: Any = source.args[0]
        with gm.graph.inserting_before(node):
            for move in reversed(moves):
                if move not in conversions:
                    value = call(gm, move, move.target, value, *move.args[1:], **move.kwargs)
            last = call(gm, source, source.target, value, *source.args[1:], **source.kwargs)
            take_over(last, source)
            for move in reversed(conversions):
                last = call(gm, move, move.target, last, *move.args[1:], **move.kwargs)
        node.replace_input_with(first, last)
        count += 1
    return count


def one_dequantize_per_user(gm: GraphModule) -> int:
    """``dq(x, …)`` with several users => one each, told apart by a ``quant_min`` that no kernel reads.

    Inductor's patterns (of pools, cat and reshape) want a dequantize of their own for each operand. Equal nodes would
    be merged again before they are tried.
    """
    copies: Counter[tuple[Any, ...]] = Counter()
    count = 0
    for node in list(gm.graph.nodes):
        place = {qd.dequantize_per_channel.default: 4}.get(node.target, 3 if node.target in ACTIVATION_DQ else 0)
        if not place or not node.args[place] < node.args[place + 1]:
            continue
        # The input is no part of the key: two quantize nodes that are equal will be one node by then.
        key = (node.target, *(None if isinstance(arg, Node) else arg for arg in node.args[1:]))
        for user in list(node.users):
            number = copies[key] % (node.args[place + 1] - node.args[place])
            copies[key] += 1
            if number:
                with gm.graph.inserting_before(node):
                    args = (*node.args[:place], node.args[place] + number, *node.args[place + 1 :])
                    copy = call(gm, node, node.target, *args, **node.kwargs)
                take_over(copy, node)
                user.replace_input_with(node, copy)
                count += 1
        if not node.users:
            gm.graph.erase_node(node)
    return count


REWRITES: tuple[Pass, ...] = (
    use_functional_ops,
    copies_where_written,
    constants_as_operands,
    idle_dropouts,
    positional_arguments,
    constant_parameters,
    folded_weights,
    unsigned_activations,
    explicit_zero_points,
    float_biases,
    gathered_rows,
    per_channel_weights,
    weights_by_output,
    contiguous_constants,  # packing a weight that is a transposed view gives another one
    convert_after_dequantize,
    dynamic_parameters,
    token_parameters,
    narrow_ranges,
    single_precision,
    dequantize_last,
    numbered_padding,
    remove_dead_code,
    convolutions_in_two_dimensions,
    pools_in_two_dimensions,
    remove_dead_code,  # a dequantize that nobody reads counts as a use
    shared_values_first,
)
