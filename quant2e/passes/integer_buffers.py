"""Buffers of integers: what is written is quantized, what is read is dequantized.

    buffer[i] = dq(q(v)); y = f(buffer)  =  buffer[i] = q(v); y = f(dq(buffer))

for a buffer that is rounded in advance. A quantizer asks for it: it annotates what is written, and names the buffer in
the graph's ``meta`` (`BUFFERS`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from quant2e.errors import where
from quant2e.graph.attributes import attribute
from quant2e.graph.data_movement import MOVEMENTS, Effect, When
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import insert_call
from quant2e.graph.effects import aten, is_view, writes
from quant2e.graph.fake_values import empty_like
from quant2e.graph.mutation import Storage, storages
from quant2e.graph.qdq_ops import qd

BUFFERS = "quant2e_integer_buffers"
"""Key in ``gm.meta``: paths of the buffers that a quantizer wants as integers."""

WRITTEN = {
    aten.copy_.default: "src",
    aten.index_put_.default: "values",
    aten.index_copy_.default: "source",
    aten.scatter_.src: "src",
}
"""Ops that write values as they are, and the name of the operand that holds them."""

_DQ = qd.dequantize_per_tensor.default


def holders(gm: GraphModule, path: str) -> list[Node]:
    """The nodes whose memory is that of the buffer at ``path``: what reads it, views of it, and what writes to it."""
    held: dict[Node, None] = {}
    for node in gm.graph.nodes:
        own = node.op == "get_attr" and str(node.target) == path
        moves = _is_view_of_any_dtype(node) and node.all_input_nodes[0] in held
        if own or moves or any(each in held for each in writes(node)):
            held[node] = None
    return list(held)


def _is_view_of_any_dtype(node: Node) -> bool:
    movement = MOVEMENTS.get(node.target) if isinstance(node.target, OpOverload) else None
    if movement is None or movement.when is not When.ALWAYS or movement.effect in (Effect.SPLIT, Effect.JOIN):
        return False
    return movement.integers and is_view(node)


def writers(gm: GraphModule, path: str) -> list[Node]:
    """The nodes that write to the buffer at ``path``."""
    held = set(holders(gm, path))
    return [node for node in gm.graph.nodes if any(each in held for each in writes(node))]


def integer_buffers(gm: GraphModule) -> list[str]:
    """Make integers of the buffers that ``gm.meta`` names, in place, before dequantize ops are shared out; notes.

    One that cannot be stays as it is, rounded to the same numbers, and a note says why.
    """
    notes = []
    for path in gm.meta.get(BUFFERS, ()):
        reason = next(_objections(gm, path), None)
        if reason is not None:
            notes.append(f"the buffer '{path}' stays float: {reason}")
            continue
        notes.append(_make_integer(gm, path, holders(gm, path)))
    return notes


def _value(writer: Node) -> Any:
    """The operand that is written; None where values are not written as they are."""
    return operand(writer, WRITTEN[writer.target]) if writer.target in WRITTEN else None


def _objections(gm: GraphModule, path: str) -> Iterator[str]:
    written = writers(gm, path)
    if not written:
        yield "nothing writes to it any more"
        return
    if (dtype := attribute(gm, path).dtype) != torch.float32:
        yield f"it is {str(dtype).removeprefix('torch.')}, and only float32 is rounded"
    if (other := _other_name(gm, holders(gm, path), written[-1])) is not None:
        yield f"{where(other)} may be the same memory under another name"
    for node in written:
        value = _value(node)
        if not isinstance(value, Node) or operand(node, "accumulate") or writes(node) != [node.args[0]]:
            yield f"{where(node)} does more than write values as they are"
        elif value.target is not _DQ:
            yield f"what {where(node)} writes has no parameters of its own"
    if len({_value(node).args[1:] for node in written if isinstance(_value(node), Node)}) > 1:
        yield "what is written has several scales"


def _other_name(gm: GraphModule, held: Sequence[Node], last: Node) -> Node | None:
    """A node that may share the memory of the holders, is none, and could see a write, or write itself."""
    memory = storages(gm.graph)
    places = frozenset[Storage]().union(*(memory[node] for node in held))
    touched = {each for node in gm.graph.nodes for each in writes(node)}
    others = (node for node in memory if node not in held and not memory[node].isdisjoint(places))
    return next((node for node in others if node.op == "get_attr" or node in touched or node < last), None)


def _make_integer(gm: GraphModule, path: str, held: Sequence[Node]) -> str:
    written = writers(gm, path)
    parameters = _value(written[0]).args[1:]
    before: Tensor = attribute(gm, path)
    after = qd.quantize_per_tensor.default(before.detach().float(), *parameters)
    moved = float((_DQ(after, *parameters) - before).abs().max()) if before.numel() else 0.0
    parent, _, name = path.rpartition(".")
    owner = gm.get_submodule(parent)
    table = next((table for table in (owner._parameters, owner._buffers) if name in table), owner.__dict__)
    table[name] = after
    values = {node: node.meta.get("val") for node in held}
    for node in written:
        node.replace_input_with(_value(node), _value(node).args[0])
    for node in held:
        node.meta["val"] = empty_like(values[node], after.dtype)
        for user in [user for user in node.users if user not in values]:
            user.replace_input_with(node, insert_call(user, _DQ, (node, *parameters), value=values[node]))
    told = f"the buffer '{path}' holds {str(after.dtype).removeprefix('torch.')}, scale {parameters[0]:.4g}: "
    told += f"{after.nbytes:,} bytes instead of {before.nbytes:,}"
    steps = moved / parameters[0]
    return told + (f"; its initial value moves by up to {steps:.0f} steps" if steps > 1 else "")
