"""Lookup tables that XNNPACK frees too early, and the ops to leave out of a delegate so that it makes none of them.

XNNPACK joins elementwise ops between two 8-bit tensors to one table of 256 values, and then asks of the op that reads
the table whether it can be joined as well. In XNNPACK of ExecuTorch 1.4 (``xnn_subgraph_fuse_unary_quantized_into_lut``
at 1adaa7c7) that question goes wrong in two ways, and each time the table is freed and stays in use: values are wrong,
and freeing the program frees it again, which ends the process. ExecuTorch 1.5.1 has another fault.

- The copy of an op with two inputs takes as many outputs, the second of them value 0: the first argument of the
  delegate. A sum of a table's result and that argument looks like a function of one tensor. The values do not fit, so
  that the attempt fails, or they do (256 in a row, or one), and the process ends while the program is loaded.
- No more than `LONGEST` ops are joined. In a longer chain the table is asked for the rest.
- In ExecuTorch 1.5.1 a table of exactly `LONGEST` ops ends the process while the program is loaded. A conversion and
  its inverse are dropped first, so that longer chains may come to this number: no chain is as long.

XNNPACK has neither of the first two since August 2026 at the latest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lowering.export import op_name

LONGEST = 10
"""``XNN_MAX_UNARY_FUSION_NODES``."""

IMPLICIT = "IS_IMPLICIT_Q_DQ_TAG"
"""In ``meta`` of quantize and dequantize ops that the op between them does by itself."""

_CONVERSIONS = frozenset(f"quantized_decomposed.{name}_per_tensor.default" for name in ("quantize", "dequantize"))
# fmt: off
_UNARY = _CONVERSIONS | {"aten.pow.Tensor_Scalar"} | {
    f"aten.{name}.default"
    for name in (
        "abs", "ceil", "clamp", "cos", "elu", "exp", "floor", "gelu", "hardswish", "hardtanh", "leaky_relu", "log",
        "neg", "relu", "rsqrt", "sigmoid", "sin", "sqrt", "tanh",
    )
}
_BINARY = frozenset(
    f"aten.{name}"
    for name in (
        "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum.default", "minimum.default", "prelu.default",
    )
)
# fmt: on
_COPIES = frozenset(
    (
        *(f"aten.{name}.default" for name in ("clone", "expand_copy", "squeeze_copy", "unsqueeze_copy", "view_copy")),
        *(f"dim_order_ops.{name}.default" for name in ("_clone_dim_order", "_to_dim_order_copy")),
        "aten.squeeze_copy.dims",
    )
)
"""XNNPACK may drop them, and then reads what they read."""
_JOINED = _UNARY | _BINARY | _COPIES


@dataclass(frozen=True, slots=True)
class _Delegate:
    """``nodes``: its ops; ``firsts``: what may be its first argument; ``constants``: of the program."""

    nodes: frozenset[Node]
    firsts: frozenset[Node]
    constants: frozenset[Node]

    def value(self, node: Node) -> Node:
        """Whose value XNNPACK reads where an op of the delegate reads ``node``."""
        while node in self.nodes and (node.meta.get(IMPLICIT) or op_name(node) in _COPIES):
            node = node.all_input_nodes[0]
        return node

    def chain(self, node: Node) -> list[Node]:
        """The values of elementwise ops of one tensor that lead to ``node``, the last first."""
        values = [self.value(node)]
        while values[-1] in self.nodes and (source := self._only_input(values[-1])) is not None:
            values.append(self.value(source))
        return values

    def _only_input(self, node: Node) -> Node | None:
        if op_name(node) not in _UNARY | _BINARY:
            return None
        inputs = [each for each in node.all_input_nodes if self.value(each) not in self.constants]
        return inputs[0] if len(inputs) == 1 else None

    def has_table(self, chain: Sequence[Node]) -> bool:
        """Whether two or more ops lead from one 8-bit value to another."""
        places = [place for place, node in enumerate(chain) if self._is_8_bit(node)]
        return bool(places) and places[-1] - places[0] > 1

    def _is_8_bit(self, node: Node) -> bool:
        value = node.meta.get("val")
        integers = isinstance(value, Tensor) and value.dtype is torch.int8
        return integers or any(user.meta.get(IMPLICIT) and user in self.nodes for user in node.users)

    def _leads_to_8_bit(self, node: Node) -> bool:
        pending, seen = [node], {node}
        while pending:
            value = pending.pop()
            if self._is_8_bit(value):
                return True
            pending += [each for each in value.users if each in self.nodes - seen and op_name(each) in _JOINED]
            seen.update(pending)
        return False

    def is_unsafe(self, node: Node) -> bool:
        """Whether XNNPACK may take an op for one to join with the table in front of it."""
        if op_name(node) in _BINARY:
            operands = node.all_input_nodes
            beside = [each for each in operands if self.value(each) in self.firsts]
            behind = [each for each in operands if each not in beside and self.has_table(self.chain(each))]
            return bool(beside) and bool(behind) and self._leads_to_8_bit(node)
        if node.meta.get(IMPLICIT) or op_name(node) not in _UNARY:
            return False
        begin = self.chain(node)[LONGEST : LONGEST + 1]
        return any(map(self._is_8_bit, begin)) and self._leads_to_8_bit(node)


def beside_tables(nodes: Sequence[Node], exported: ExportedProgram) -> list[Node]:
    """The ops of a delegate that XNNPACK may join with a table that it then frees: they must not be in it.

    ``nodes``: ops of ``exported``. Any value that they read from outside may become the first argument: ExecuTorch
    sorts its graph anew whenever it has taken a delegate out.
    """
    inside = frozenset(nodes)
    outside = frozenset(source for node in nodes for source in node.all_input_nodes if source not in inside)
    return _unsafe(nodes, _Delegate(inside, outside, _constants(exported)))


def beside_tables_in(exported: ExportedProgram) -> list[Node]:
    """The same of the program of a delegate, whose first argument is known."""
    ops = [node for node in exported.graph.nodes if node.op == "call_function"]
    first = exported.graph_signature.user_inputs[:1]
    firsts = frozenset(node for node in exported.graph.nodes if node.op == "placeholder" and node.name in first)
    return _unsafe(ops, _Delegate(frozenset(ops), firsts, _constants(exported)))


def _unsafe(nodes: Iterable[Node], delegate: _Delegate) -> list[Node]:
    """Of a chain the first: without it, those behind it may be safe."""
    found = dict.fromkeys(node for node in nodes if delegate.is_unsafe(node))
    return [node for node in found if op_name(node) in _BINARY or found.keys().isdisjoint(delegate.chain(node)[1:])]


def _constants(exported: ExportedProgram) -> frozenset[Node]:
    signature = exported.graph_signature
    names = {
        *signature.inputs_to_parameters,
        *signature.inputs_to_buffers,
        *signature.inputs_to_lifted_tensor_constants,
    }
    return frozenset(node for node in exported.graph.nodes if node.op == "placeholder" and node.name in names)


def parted(groups: Iterable[list[Node]], left_out: frozenset[Node]) -> Iterator[list[Node]]:
    """Groups that a delegate takes whole, without some ops: what else is in a group of one is taken by itself."""
    for group in groups:
        if left_out.isdisjoint(group):
            yield group
            continue
        for node in group:
            node.meta.pop(IMPLICIT, None)
        yield from ([node] for node in group if node not in left_out)
