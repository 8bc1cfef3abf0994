"""How data flows between the nodes of an ATen graph: operands, uses, writes in place, constants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg


def operand(node: Node, name: int | str) -> Any:
    """The operand at a position, or under a schema name, wherever it was spelled; the schema's default, or None."""
    if not isinstance(node.target, OpOverload):
        if isinstance(name, int):
            return node.args[name] if name < len(node.args) else None
        return node.kwargs.get(name)
    arguments = node.target._schema.arguments
    index = name if isinstance(name, int) else next((i for i, a in enumerate(arguments) if a.name == name), None)
    if index is None or index >= len(arguments):
        return None
    if index < len(node.args):
        return node.args[index]
    argument = arguments[index]
    default = argument.default_value if argument.has_default_value() else None
    return node.kwargs.get(argument.name, default)


def uses(node: Node) -> int:
    """How often the value of ``node`` is used: ``add(x, x)`` uses ``x`` twice."""
    count = 0

    def visit(arg: Node) -> Node:
        nonlocal count
        count += arg is node
        return arg

    for user in node.users:
        map_arg((user.args, user.kwargs), visit)
    return count


def is_view(node: Node) -> bool:
    """True if the op returns an alias of its first operand without writing to it."""
    if not isinstance(node.target, OpOverload):
        return False
    schema = node.target._schema
    named = schema.name in ("aten::dropout", "aten::feature_dropout")  # return their operand in eval mode
    return not schema.is_mutable and (named or any(r.alias_info is not None for r in schema.returns))


def is_in_place(node: Node) -> bool:
    """True if the op writes to an operand."""
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def alias_of_written(node: Node) -> Node | None:
    """Through which node somebody else would see what an in-place op writes; None if nobody would.

    Such an op cannot be given a quantized operand: the write would land in a copy.
    """
    if not is_in_place(node) or not isinstance(written := operand(node, 0), Node):
        return None
    if (view := next((user for user in written.users if is_view(user)), None)) is not None:
        return view
    while is_view(written) and isinstance(base := operand(written, 0), Node):
        if uses(base) != 1:
            return written
        written = base
    return written if written.op in ("get_attr", "placeholder") else None


@dataclass(slots=True)
class Constants:
    """Which nodes depend on parameters and buffers only. Each node is looked at once."""

    _culprit: dict[Node, Node | None] = field(default_factory=dict)

    def culprit(self, node: Node) -> Node | None:
        """None if the value of ``node`` is constant; else a node that makes it depend on data."""
        stack = [node]
        while stack:
            top = stack[-1]
            waiting = [n for n in top.all_input_nodes if n not in self._culprit] if top not in self._culprit else []
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            if top not in self._culprit:
                self._culprit[top] = self._own_culprit(top)
        return self._culprit[node]

    def _own_culprit(self, node: Node) -> Node | None:
        if node.op == "get_attr":
            return next((user for user in node.users if is_in_place(user) and operand(user, 0) is node), None)
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return node
        return next((c for n in node.all_input_nodes if (c := self._culprit[n]) is not None), None)
