"""Integer data movement: ops that only move or select values stay between integers.

    dequantize → move → op          =  dequantize → move → quantize → dequantize → op
    op → move → quantize            =  op → quantize → dequantize → move → quantize

with one scale throughout: moving values and picking the largest commute with a monotone grid, and quantizing a
value that is already on the grid gives the same integer back. XNNPACK computes on integers only where it sees a
dequantize on every input and a quantize on the output.

And each reader of quantized images dequantizes by itself: where one wants their channels back in front, in ExecuTorch
1.4, the others of the same dequantize get them so as well.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.requirements import of_images
from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.edit import emit
from quant2e.graph.qdq_ops import qd

_ATEN = torch.ops.aten
MOVES = movements(Effect.SAME, Effect.RESHAPE, Effect.PERMUTE, Effect.SLICE) | {_ATEN.max_pool2d.default}
"""What XNNPACK has integer kernels for: reshapes, permutations and slices, in whatever spelling (the partitioner sees
few of them), and the pooling that picks values."""
ARITHMETIC = frozenset(
    {
        _ATEN.linear.default,
        _ATEN.conv1d.default,
        _ATEN.conv2d.default,
        _ATEN.conv_transpose2d.input,
        _ATEN.add.Tensor,
        _ATEN.add_.Tensor,
        _ATEN.sub.Tensor,
        _ATEN.mul.Tensor,
        _ATEN.cat.default,
        _ATEN.mean.dim,
        _ATEN.adaptive_avg_pool2d.default,
    }
)
CLAMPS = frozenset(
    {_ATEN.relu.default, _ATEN.relu_.default, _ATEN.hardtanh.default, _ATEN.hardtanh_.default, _ATEN.clamp.default}
)
_QUANTIZE, _DEQUANTIZE = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default


def quantize_moves(module: GraphModule) -> int:
    """Put the missing quantize/dequantize pairs around movement; returns how many pairs."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in MOVES:
            count += _after_dequantize(node)
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_function" and node.target in MOVES:
            count += _before_quantize(node)
    return count


def _is(node: object, target: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def requantized(like: Node, value: Node, grid: tuple[object, ...]) -> Node:
    """A quantize and a dequantize of ``value`` right before ``like``, on one grid."""
    return emit(like, _DEQUANTIZE, emit(like, _QUANTIZE, value, *grid), *grid)


def _after_dequantize(move: Node) -> int:
    """Close a move between a dequantize and an op that computes in integers, with the grid it was opened with."""
    source = move.args[0]
    if not _is(source, _DEQUANTIZE) or not isinstance(source, Node) or source.kwargs.get("out_dtype"):
        return 0
    users = [user for user in move.users if not _is(user, _QUANTIZE)]
    wanted = [user for user in users if user.target in MOVES or _in_integers(user)]
    if not wanted or not any(_reaches_integers(user) for user in wanted):
        return 0
    pair = requantized(move.next, move, tuple(source.args[1:]))
    for user in wanted:
        user.replace_input_with(move, pair)
    return 1


def _reaches_integers(node: Node) -> bool:
    if node.target in MOVES:
        return any(_is(user, _QUANTIZE) or _reaches_integers(user) for user in node.users)
    return _in_integers(node)


def _in_integers(node: Node) -> bool:
    """Whether an op computes on quantized values: integer weights, or arithmetic whose result is quantized again."""
    if node.target not in ARITHMETIC and node.target not in CLAMPS:
        return False
    if (
        len(node.args) > 1
        and isinstance(node.args[1], Node)
        and node.args[1].target is qd.dequantize_per_channel.default
    ):
        return True
    return any(_is(user, _QUANTIZE) or (user.target in CLAMPS and _in_integers(user)) for user in node.users)


def _before_quantize(move: Node) -> int:
    """Quantize what an op produced before it is moved, with the grid the moved values get."""
    source = move.args[0]
    if not isinstance(source, Node) or len(source.users) != 1 or not _computes_on_quantized(source):
        return 0
    grids = {tuple(user.args[1:]) for user in move.users if _is(user, _QUANTIZE)}
    if len(grids) != 1 or not all(_is(user, _QUANTIZE) for user in move.users):
        return 0
    move.replace_input_with(source, requantized(move, source, grids.pop()))
    return 1


def _computes_on_quantized(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in CLAMPS and isinstance(node.args[0], Node) and len(node.args[0].users) == 1:
        return _computes_on_quantized(node.args[0]) or _is(node.args[0], _DEQUANTIZE)
    if node.target not in ARITHMETIC:
        return False
    first = node.args[0]
    operands = first if isinstance(first, list | tuple) else [first]
    return all(_is(operand, _DEQUANTIZE) for operand in operands)


def one_grid(module: GraphModule) -> int:
    """Give movement and concatenation one scale on all sides, with a requantization of its own; returns how many.

        dequantize(A) → move → quantize(B)  =  dequantize(A) → move → quantize(A) → dequantize(A) → quantize(B)
        cat(dequantize(A), …) → quantize(B) =  cat(dequantize(A) → quantize(B) → dequantize(B), …) → quantize(B)

    XNNPACK has no kernel that moves integers from one scale to another; such a program fails when it is loaded.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or len(node.users) != 1 or not _is(quantize := next(iter(node.users)), _QUANTIZE):
            continue
        if node.target in MOVES and _is(node.args[0], _DEQUANTIZE) and _grid(node.args[0]) != _grid(quantize):
            quantize.replace_input_with(node, requantized(quantize, node, _grid(node.args[0])))
            count += 1
        if node.target is _ATEN.cat.default and all(_is(operand, _DEQUANTIZE) for operand in node.args[0]):
            foreign = {operand for operand in node.args[0] if _grid(operand) != _grid(quantize)}
            for operand in sorted(foreign, key=lambda n: n.name):
                node.replace_input_with(operand, requantized(node, operand, _grid(quantize)))
            count += len(foreign)
    return count


def _grid(node: Node) -> tuple[object, ...]:
    """Scale, zero point, bounds and dtype of a per-tensor quantize or dequantize."""
    return tuple(node.args[1:])


def dequantized_by_reader(module: GraphModule) -> int:
    """Give each reader of a dequantize of images its own, in place; returns how many dequantize ops had several."""
    count = 0
    for node in module.graph.find_nodes(op="call_function", target=qd.dequantize_per_tensor.default):
        _, *others = node.users or (None,)
        if not others or not of_images(node):
            continue
        for reader in others:
            with module.graph.inserting_before(reader):
                own = module.graph.node_copy(node, lambda each: each)
            reader.replace_input_with(node, own)
        count += 1
    return count
