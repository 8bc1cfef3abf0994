"""Core ATen: ops of a decomposed program become those of one that is not, where these compute the same.

    convolution(x, w, b, …)                       =  conv2d(x, w, b, …)          or conv_transpose2d, by dimensions
    native_layer_norm(x, …)[0]                    =  layer_norm(x, …)            and other ops of several results
    view(addmm(b, view(x), permute(w)))           =  linear(x, w, b)

``ExportedProgram.run_decompositions()`` writes a program in these smaller ops, and files hold such programs. Quantizers
and lowerings know an op by the name that ``torch.export`` gives it, so what is spelled otherwise would stay float.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from quant2e.graph.constants import Constants
from quant2e.graph.data_movement import MOVEMENTS, Effect, movements
from quant2e.graph.dataflow import operand, operands, without_defaults
from quant2e.graph.edit import take_over
from quant2e.graph.effects import writes
from quant2e.graph.fake_values import node_tensor

aten = torch.ops.aten

Call = tuple[Any, tuple[Any, ...]]
"""What a node is to call instead, and with which operands."""


def _named(node: Node, *names: str) -> tuple[Any, ...]:
    return tuple(operand(node, name) for name in names)


def _dims(node: Node, name: str = "input") -> int:
    """How many dimensions an operand has; 0 when that is not known."""
    value = node_tensor(operand(node, name))
    return 0 if value is None else value.dim()


# ---------------------------------------------------------------- one op for another

_CONVOLUTIONS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}
_TRANSPOSED = {3: aten.conv_transpose1d.default, 4: aten.conv_transpose2d.input, 5: aten.conv_transpose3d.input}


def _convolution(node: Node) -> Call | None:
    transposed = bool(operand(node, "transposed"))
    target = (_TRANSPOSED if transposed else _CONVOLUTIONS).get(_dims(node))
    if target is None:
        return None
    more = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    return target, _named(node, "input", "weight", "bias", "stride", "padding", *more)


def _batch_norm(node: Node) -> Call:
    tensors = _named(node, "input", "weight", "bias", "running_mean", "running_var")
    return aten.batch_norm.default, (*tensors, False, *_named(node, "momentum", "eps"), True)


def _layer_norm(node: Node) -> Call:
    return aten.layer_norm.default, _named(node, "input", "normalized_shape", "weight", "bias", "eps")


def _group_norm(node: Node) -> Call:
    return aten.group_norm.default, _named(node, "input", "group", "weight", "bias", "eps")


def _embedding_bag(node: Node) -> Call:
    names = ("scale_grad_by_freq", "mode", "sparse", "per_sample_weights", "include_last_offset")
    padding = operand(node, "padding_idx")
    tensors = _named(node, "weight", "indices", "offsets", *names)
    return aten.embedding_bag.padding_idx, (*tensors, None if padding == -1 else padding)


def _pooled(target: Any) -> Callable[[Node], Call]:
    return lambda node: (target, _named(node, "self", "kernel_size", "stride", "padding", "dilation", "ceil_mode"))


def _softmax(target: Any) -> Callable[[Node], Call]:
    def call(node: Node) -> Call:
        dtype = torch.float32 if operand(node, "half_to_float") else None
        return target, (*_named(node, "self", "dim"), dtype)

    return call


def _renamed(target: Any) -> Callable[[Node], Call]:
    return lambda node: (target, tuple(operands(node).values()))


_FIRST_OF_SEVERAL: Mapping[Any, Callable[[Node], Call]] = {
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.max_pool2d_with_indices.default: _pooled(aten.max_pool2d.default),
    aten.max_pool3d_with_indices.default: _pooled(aten.max_pool3d.default),
}
"""Ops with more results than their counterpart: it takes their place where only the first is read."""

_SINGLE: Mapping[Any, Callable[[Node], Call | None]] = {
    aten.convolution.default: _convolution,
    aten._softmax.default: _softmax(aten.softmax.int),
    aten._log_softmax.default: _softmax(aten.log_softmax.int),
    aten._embedding_bag.default: _embedding_bag,
    aten._adaptive_avg_pool2d.default: _renamed(aten.adaptive_avg_pool2d.default),
    aten._adaptive_avg_pool3d.default: _renamed(aten.adaptive_avg_pool3d.default),
}

_SPELLINGS: Mapping[Any, Any] = {
    aten._unsafe_index.Tensor: aten.index.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}
"""Ops that take the operands of their counterpart: the node stays, and calls it."""


def _copies() -> Mapping[Any, Any]:
    """Ops of the edge dialect that copy what others view, ``permute_copy`` say, and those others."""
    found: dict[Any, Any] = {}
    for target, movement in MOVEMENTS.items():
        name = target._schema.name.removeprefix("aten::")
        view = getattr(getattr(aten, name.removesuffix("_copy"), None), target._overloadname, None)
        if name.endswith("_copy") and view in MOVEMENTS and movement.effect is not Effect.SAME:
            found[target] = view
    return found | {aten.view_copy.default: aten.reshape.default}  # a view is not always possible


_COPIES = _copies()


# ---------------------------------------------------------------- the pass


_ONLY_WHOLE = frozenset(
    {aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.layer_norm.default}
)
"""Ops that no decomposed program has: beside them, what is in smaller ops was written so, and quantizers of other
libraries may look for it."""


def compose_core_ops(gm: GraphModule) -> int:
    """Rewrite ops of core ATen in ``gm``, in place, those in the bodies of control flow too; returns how many.

    A graph that ``torch.export`` made and nobody decomposed holds none. Results are the same, bit for bit.
    """
    count = 0
    for module in gm.modules():
        if isinstance(module, GraphModule):
            found = _compose(module.graph)
            if found and module is not gm:
                module.recompile()
            count += found
    return count


def _compose(graph: Graph) -> int:
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    found = {node.target for node in nodes}
    if found & _ONLY_WHOLE:
        return 0
    decomposed = bool(found & _ONLY_DECOMPOSED)
    count = sum(_one(node) for node in nodes if node.target in _SINGLE or node.target in _FIRST_OF_SEVERAL)
    if found & _PRODUCTS:
        constants = Constants(graph)
        count += sum(_linear(node, constants) for node in nodes if node.target in _PRODUCTS)
    if decomposed:
        count += sum(_global_pool(node) for node in nodes if node.target is aten.mean.dim)
    spellings = dict(_SPELLINGS)
    if found & set(_COPIES) and not any(map(writes, nodes)):  # nobody sees the difference between copy and view
        spellings.update(_COPIES)
    for node in graph.nodes:
        if node.target in spellings:
            node.target = spellings[node.target]
            count += 1
    return count


def _one(node: Node) -> bool:
    old = [node]
    if node.target in _FIRST_OF_SEVERAL:
        call: Call | None = _FIRST_OF_SEVERAL[node.target](node)
        old = [user for user in node.users if user.users]
        if not old or any(user.target is not operator.getitem or user.args[1] != 0 for user in old):
            return False
    else:
        call = _SINGLE[node.target](node)
    if call is None:
        return False
    _put(node, old, *call)
    return True


def _put(place: Node, old: Sequence[Node], target: Any, args: tuple[Any, ...]) -> None:
    """A call in front of ``place``, called after its op as in a graph of ``torch.export``, whose result ``old`` were.

    What computed them, ``place`` above all, and is read no more is removed.
    """
    graph, name = place.graph, target._schema.name.removeprefix("aten::")
    with graph.inserting_before(place):
        new = graph.create_node("call_function", target, without_defaults(target, args), name=name)
    take_over(new, old[0])
    for result in old:
        result.replace_all_uses_with(new)
    for dead in dict.fromkeys((*place.users, *old, place, *place.all_input_nodes)):
        if not dead.users and dead.op == "call_function" and dead is not new:
            graph.erase_node(dead)


_PRODUCTS = frozenset({aten.addmm.default, aten.mm.default})
_VIEWS = movements(Effect.RESHAPE)


def _linear(node: Node, constants: Constants) -> bool:
    """A product of rows with a constant weight whose axes are exchanged, on whatever number of axes the rows had."""
    biased = node.target is aten.addmm.default
    x, exchanged = _named(node, *(("mat1", "mat2") if biased else ("self", "mat2")))
    bias = operand(node, "self") if biased else None
    if exchanged.target is not aten.permute.default or list(operand(exchanged, "dims")) not in ([1, 0], [-1, -2]):
        return False
    weight = operand(exchanged, "self")
    if weight not in constants or x in constants:
        return False
    if biased and (_dims(node, "self") != 1 or operand(node, "alpha") != 1 or operand(node, "beta") != 1):
        return False
    rows, old = _rows(node, x)
    _put(node, old, aten.linear.default, (rows, weight, bias))
    return True


def _rows(node: Node, x: Node) -> tuple[Node, list[Node]]:
    """What a product's rows are a view of, and the views of its result in which these axes are back; else the product
    itself.
    """
    source, result = operand(x, 0) if x.target in _VIEWS else None, node_tensor(node)
    value, users = node_tensor(source), list(node.users)
    if source is None or value is None or result is None or not users or value.dim() <= 2:
        return x, [node]
    wanted = (*value.shape[:-1], result.shape[-1])
    width = node_tensor(x)
    if width is None or not _same(width.shape[-1:], value.shape[-1:]):
        return x, [node]
    back = all(user.target in _VIEWS and _same(_shape(user), wanted) for user in users)
    return (source, users) if back else (x, [node])


def _shape(node: Node) -> tuple[Any, ...]:
    value = node_tensor(node)
    return () if value is None else tuple(value.shape)


def _same(sizes: Any, others: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy: not while importing

    return len(sizes) == len(others) and all(statically_known_true(a == b) for a, b in zip(sizes, others, strict=True))


_GLOBAL = {(-1, -2): aten.adaptive_avg_pool2d.default, (-1, -2, -3): aten.adaptive_avg_pool3d.default}
"""Axes of a mean, as the decomposition of a pool to one value writes them, and that pool."""


def _global_pool(node: Node) -> bool:
    axes = tuple(operand(node, "dim") or ())
    target = _GLOBAL.get(axes)
    if target is None or operand(node, "keepdim") is not True or operand(node, "dtype") is not None:
        return False
    if _dims(node, "self") not in (len(axes) + 1, len(axes) + 2):
        return False
    _put(node, [node], target, (operand(node, "self"), [1] * len(axes)))
    return True


_ONLY_DECOMPOSED = frozenset((*_SINGLE, *_FIRST_OF_SEVERAL, *_PRODUCTS))
"""Ops that programs hold which were decomposed; some users write them, too."""
