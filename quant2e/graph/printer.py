"""Text form of a graph: one stable line per node, for tests, diffs and eyes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

_SHORT = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64",
    torch.int8: "s8", torch.uint8: "u8", torch.int16: "s16", torch.uint16: "u16", torch.int32: "s32",
    torch.int64: "s64", torch.bool: "bool",
}  # fmt: skip


def dtype_text(dtype: torch.dtype) -> str:
    """``torch.int8`` as ``s8``."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def _target_text(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    name = getattr(node.target, "__name__", str(node.target))
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else name


def _argument_text(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument_text(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_argument_text(v)}" for k, v in value.items()) + "}"
    return dtype_text(value) if isinstance(value, torch.dtype) else repr(value)


def _value_text(node: Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    return f": {dtype_text(value.dtype)}[{', '.join(str(s) for s in value.shape)}]"


def graph_text(graph: Graph | GraphModule) -> str:
    """One line per node, ``%name: dtype[shape] = target(arguments)``; what nobody reads is shown as well."""
    lines = []
    graph = graph.graph if isinstance(graph, GraphModule) else graph
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {_argument_text(node.args[0])}")
            continue
        arguments = [_argument_text(a) for a in node.args] + [
            f"{k}={_argument_text(v)}" for k, v in node.kwargs.items()
        ]
        call = f"({', '.join(arguments)})" if node.op not in ("placeholder", "get_attr") else ""
        kind = f"{node.op} " if node.op in ("placeholder", "get_attr") else ""
        lines.append(f"%{node.name}{_value_text(node)} = {kind}{_target_text(node)}{call}")
    return "\n".join(lines)
