"""Weight folding: constants become integers in the file, not at run time.

    q(w)        =>        w_quantized            where w depends on parameters only

The float copy goes as soon as nothing else reads it. Of weights that lie in files the integers are kept in their short
form, where they have one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.fx import GraphModule, Node

from quant2e.graph.attributes import tensor_at
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.edit import emit_constant, replace
from quant2e.graph.qdq_ops import QUANTIZE, qd
from quant2e.ranges.blocks import by_blocks
from quant2e.ranges.qparams import quantize_per_channel
from quant2e.stored_tensor import stored_in
from quant2e.weights.short_form import in_short_form


def attribute_path(node: Node) -> str:
    """Path of the first parameter or buffer that a constant node is computed from; its name when there is none."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop(0)
        if current.op == "get_attr":
            return str(current.target)
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return node.name


def is_quantize(node: Node) -> bool:
    """Whether a node turns floats into integers: one of our quantize ops, or another library's.

    Casts to float16 are not folded: Inductor finds its float16 kernels by the cast in front of the weight.
    """
    target = getattr(node.target, "overloadpacket", node.target)
    if not isinstance(target, OpOverloadPacket):
        return False
    namespace, _, name = target._qualified_op_name.partition("::")
    return node.target in QUANTIZE or (namespace != "aten" and name.startswith("quantize_"))


def _integers(gm: GraphModule, node: Node) -> Tensor:
    """What a quantize op on a constant computes. Per channel by our own arithmetic: the same bits, in fewer passes."""
    if node.target not in _ROW_BY_ROW or node.kwargs:
        value: Tensor = evaluate(gm, node)
        return value
    given: list[Any] = [evaluate(gm, arg) if isinstance(arg, Node) else arg for arg in node.args]
    with torch.no_grad():
        x, scale, zero_point, *others = given
        dtype = next(one for one in others if isinstance(one, torch.dtype))
        by_row = _parameters_by_row(node.target, given)
        return by_blocks(_ROW_BY_ROW[node.target], x, (scale, zero_point), by_row, others, dtype)


_ROW_BY_ROW: Mapping[Any, Callable[..., Tensor]] = {
    qd.quantize_per_tensor.default: qd.quantize_per_tensor.default,
    qd.quantize_per_channel.default: quantize_per_channel,
    qd.quantize_per_channel_group.default: qd.quantize_per_channel_group.default,
}
"""Quantize ops that compute a slice of the first dimension from that slice alone, and what computes them here."""


def _parameters_by_row(target: Any, given: Sequence[Any]) -> bool:
    """Whether scales and zero points, the second and third operand, have an entry for each index of that dimension."""
    if target is qd.quantize_per_channel.default:
        return bool(given[3] % given[0].dim() == 0)
    return target is qd.quantize_per_channel_group.default


_KNOWN: ContextVar[list[tuple[Any, Tensor, list[Any], Tensor]] | None] = ContextVar("known weights", default=None)


@contextmanager
def weights_in_memory_once() -> Iterator[None]:
    """Graphs that are converted inside, one after the other, and quantize one parameter equally, hold one weight."""
    token = _KNOWN.set([])
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _weight(gm: GraphModule, node: Node, short: bool) -> Tensor:
    """As `_integers`, perhaps in its short form; a tensor of `weights_in_memory_once` where there is one."""
    known, parameter = _KNOWN.get(), tensor_at(gm, node.args[0])
    if known is None or parameter is None:
        return _kept(_integers(gm, node), short)
    others = [evaluate(gm, arg) if isinstance(arg, Node) else arg for arg in (*node.args[1:], *node.kwargs.values())]
    for target, other, given, integers in known:
        if target is node.target and other is parameter and all(map(_equal, given, others)):
            return integers
    known.append((node.target, parameter, others, made := _kept(_integers(gm, node), short)))
    return made


def _kept(integers: Tensor, short: bool) -> Tensor:
    return in_short_form(integers, repeats=False) if short else integers


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)


def fold_weights(gm: GraphModule) -> int:
    """Evaluate every quantize op on a constant and keep its integers as a buffer; returns how many."""
    constants, short = Constants(gm.graph), stored_in(gm)
    count = 0
    for node in list(gm.graph.nodes):
        if node not in constants or not is_quantize(node):
            continue
        value = _weight(gm, node, short)
        integers = emit_constant(gm, node, f"{attribute_path(node)}_quantized", value)
        integers.meta = {**node.meta, "val": integers.meta["val"]}  # the same tensor, not one of its own
        replace(node, integers)
        count += 1
    return count
