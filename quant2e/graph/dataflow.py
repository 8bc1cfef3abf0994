"""Data flow: the operands of a node and the uses of its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

aten = torch.ops.aten

SHAPE_READERS = frozenset(
    {aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int, aten.sym_storage_offset.default}
)
"""Ops that read the shape of a tensor and none of its values."""


def operand(node: Node, name: int | str, default: Any = None) -> Any:
    """The operand under a schema name, or at a place in the schema, wherever it was spelled; else the schema's default.

    ``default`` where the schema has none, and for operands that the op does not have. A call of something without a
    schema has what is spelled: positional operands by place, keywords by name.
    """
    if not isinstance(node.target, OpOverload):
        if isinstance(name, int):
            return node.args[name] if name < len(node.args) else default
        return node.kwargs.get(name, default)
    place = _place(node.target, name)
    if place is None:
        return default
    declared = node.target._schema.arguments[place]
    if place < len(node.args) and not declared.kwarg_only:
        return node.args[place]
    return node.kwargs.get(declared.name, declared.default_value if declared.has_default_value() else default)


def operands(node: Node) -> dict[str, Any]:
    """Every operand of an ATen call by its schema name, as `operand` gives it; none for calls without a schema."""
    if not isinstance(node.target, OpOverload):
        return {}
    return {declared.name: operand(node, place) for place, declared in enumerate(node.target._schema.arguments)}


def literal(node: Node, name: int | str) -> Any:
    """An operand that is a number or a list of numbers; None when it is a tensor or symbolic."""
    value = operand(node, name)
    items = value if isinstance(value, list | tuple) else (value,)
    return None if any(isinstance(item, Node) for item in items) else value


def set_operand(node: Node, name: str, value: Any) -> None:
    """Change one operand of an ATen call, and spell it as ``torch.export`` does: by place, without defaults at the end.

    What was spelled as a keyword stays one. Raises `ValueError` for an operand that the op does not have.
    """
    target = node.target
    if not isinstance(target, OpOverload) or (place := _place(target, name)) is None:
        raise ValueError(f"'{node.name}' calls {target}, which has no operand '{name}' in a schema")
    declared = target._schema.arguments
    between = declared[len(node.args) : place]
    by_place = not declared[place].kwarg_only and name not in node.kwargs
    if by_place and all(a.has_default_value() and a.name not in node.kwargs for a in between):
        spelled = [*node.args, *(a.default_value for a in between)]
        node.args = without_defaults(target, (*spelled[:place], value, *spelled[place + 1 :]))
        return
    kept = {key: other for key, other in node.kwargs.items() if key != name}
    node.kwargs = kept if _is_default(declared[place], value) else {**node.kwargs, name: value}


def _place(target: OpOverload, name: int | str) -> int | None:
    arguments = target._schema.arguments
    if isinstance(name, int):
        return name if name < len(arguments) else None
    return next((place for place, declared in enumerate(arguments) if declared.name == name), None)


def without_defaults(target: OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Operands by place as ``torch.export`` spells them: those at the end that the schema gives anyway are left out."""
    while args and _is_default(target._schema.arguments[len(args) - 1], args[-1]):
        args = args[:-1]
    return args


def _is_default(declared: torch.Argument, value: Any) -> bool:
    if not declared.has_default_value():
        return False
    default = declared.default_value
    if isinstance(default, list):
        return isinstance(value, list | tuple) and default == list(value)
    return type(value) is type(default) and bool(value == default)


def is_pointwise(node: Node) -> bool:
    """Whether each value of the result depends on one value of each operand."""
    if not isinstance(node.target, OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target._opname.removesuffix("_") in _UNTAGGED


_UNTAGGED = frozenset({"hardswish", "relu6", "to", "_to_copy"})
"""Pointwise ops that torch does not tag as such, plain or in place."""


def readers(node: Node, through: Callable[[Node], bool]) -> Iterator[Node]:
    """Nodes that read what ``node`` produces, directly or behind others for which ``through`` is True."""
    for user in node.users:
        if through(user):
            yield from readers(user, through)
        else:
            yield user


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
