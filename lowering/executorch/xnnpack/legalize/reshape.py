"""Reshapes as views, and tensors of as many dimensions as their readers need.

    flatten, squeeze, unsqueeze, reshape  =  view, with -1 for the one size that is known at run time only
    image + y                             =  image + view(y, [1, ..., *sizes of y])
    quantize(number)                      =  quantize(view(number, [1]))

XNNPACK takes a view whose sizes are numbers, at most one of them -1. It has no squeeze, and unsqueezes at the end only.
It lays images out in channels last, and then counts the axes of an operand with fewer dimensions from the wrong end:
the runtime refuses the program. A quantized input without dimensions stops ExecuTorch's passes.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.requirements import unary
from quant2e.annotation.pattern import Match
from quant2e.graph.attributes import tensor_at
from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_constant
from quant2e.graph.fake_values import node_tensor, shape_of
from quant2e.graph.qdq_ops import DEQUANTIZE, qd
from quant2e.passes.rewrite import Rewrite

_ATEN = torch.ops.aten
RESHAPES = movements(Effect.RESHAPE)


def _changes(node: Node) -> bool | str:
    sizes = _sizes(node)
    if sizes is None:
        return f"'{node.name}' has several sizes that vary, or one of 0"
    same = node.target is _ATEN.view.default and list(operand(node, "size")) == sizes
    return not same or f"'{node.name}' is such a view"


def _view(_: GraphModule, match: Match) -> Node:
    sizes = _sizes(match.root)
    assert sizes is not None, "matched"
    return _viewed(match.root, match.edges["x"][0], sizes)


def _viewed(node: Node, x: Node, sizes: list[int]) -> Node:
    if -1 not in sizes:
        return emit(node, _ATEN.reshape.default, x, sizes)
    # where reshape has to copy it writes the unknown size out, as an expression; a view keeps the -1
    return emit(node, _ATEN.view.default, emit(node, _ATEN.contiguous.default, x), sizes)


def _sizes(node: Node) -> list[int] | None:
    """The output's sizes with -1 for the symbolic one; None when several are symbolic, or a size is 0."""
    sizes: list[int | torch.SymInt] = list(shape_of(node))
    symbolic = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(symbolic) > 1 or any(size == 0 for size in sizes if isinstance(size, int)):
        return None
    return [-1 if i in symbolic else int(size) for i, size in enumerate(sizes)]


one_view = Rewrite("one_view", unary(*RESHAPES, when=_changes), _view)
"""Reshapes of floats and integers alike as views."""


BROADCASTING = frozenset({_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor})
_IMAGE = 4
"""Dimensions of what is laid out in channels last."""


def full_rank_operands(module: GraphModule) -> int:
    """Give float operands of arithmetic on images all dimensions of the image; returns how many.

    Integers keep theirs: behind a dequantize op axes are counted right.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.target not in BROADCASTING or len(shape_of(node)) != _IMAGE:
            continue
        for place, x in enumerate(node.args[:2]):
            value = node_tensor(x)
            if not isinstance(x, Node) or value is None or value.dim() == _IMAGE or x.target in DEQUANTIZE:
                continue
            sizes = [1] * (_IMAGE - value.dim()) + list(value.shape)
            if not all(type(size) is int for size in sizes):
                continue
            constant = tensor_at(module, x)
            if constant is None:
                full = emit(node, _ATEN.view.default, x, sizes)
            else:
                full = emit_constant(module, node, f"{x.name}_of_images", constant.detach().reshape(sizes))
            node.update_arg(place, full)
            count += 1
    return count


def full_rank_constants(module: GraphModule) -> int:
    """Give quantized constants all dimensions of what they are added to or multiplied with; returns how many.

    Where the op is left to a kernel, that of ExecuTorch 1.4 takes the shape of an operand with fewer dimensions for the
    result's when the other has as many values ("Attempted to change the tensor rank").
    """
    count = 0
    for node in list(module.graph.nodes):
        rank = len(shape_of(node)) if node.target in BROADCASTING else 0
        for dq in node.all_input_nodes if rank else ():
            constant = tensor_at(module, operand(dq, 0)) if dq.target is qd.dequantize_per_tensor.default else None
            if constant is None or constant.dim() >= rank or len(dq.users) != 1:
                continue
            sizes = [1] * (rank - constant.dim()) + list(constant.shape)
            dq.update_arg(0, emit_constant(module, dq, f"{dq.name}_full", constant.detach().reshape(sizes)))
            dq.meta["val"] = dq.meta["val"].reshape(sizes)
            count += 1
    return count


def quantized_numbers(module: GraphModule) -> int:
    """Quantize tensors without dimensions as tensors of one; returns how many."""
    count = 0
    for q in list(module.graph.nodes):
        if q.target is not qd.quantize_per_tensor.default or len(shape_of(q)) > 0:
            continue
        q.update_arg(0, _in_one_dimension(q, operand(q, 0)))
        q.meta["val"] = q.meta["val"].reshape(1)
        for dq in [user for user in q.users if user.target is qd.dequantize_per_tensor.default]:
            dq.meta["val"] = dq.meta["val"].reshape(1)
            for user in list(dq.users):
                if user.target not in RESHAPES and (user.target not in BROADCASTING or not shape_of(user)):
                    user.replace_input_with(dq, emit(user, _ATEN.view.default, dq, []))
        count += 1
    return count


def _in_one_dimension(q: Node, x: Node) -> Node:
    if x.target is _ATEN.select.int:
        place = operand(x, "index")
        return emit(q, _ATEN.slice.Tensor, operand(x, "self"), 0, place, None if place == -1 else place + 1)
    return emit(q, _ATEN.view.default, x, [1])
