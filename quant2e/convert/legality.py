"""Legality of Q/DQ graphs, as a table of rules.

Each row is a rule: its name, and a function that says what is wrong with a node, or None.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule, Node

from quant2e.annotation.parameter_rules import PARAMETER_RULES
from quant2e.errors import PassError, where
from quant2e.graph.control_flow import graphs_of
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE
from quant2e.observers.base import is_observer_call
from quant2e.passes.split_dequantize import consumers


def _no_observer_left(node: Node) -> str | None:
    if is_observer_call(node):
        return "an observer is left in the graph"
    return None


def _quantizes_float(node: Node) -> str | None:
    if node.target not in QUANTIZE or not isinstance(node.args[0], Node):
        return None
    tensor = node_tensor(node.args[0])
    if tensor is not None and not tensor.is_floating_point():
        return f"it quantizes '{node.args[0].name}', a tensor of {tensor.dtype}"
    return None


def _dq_undoes_q(node: Node) -> str | None:
    source = node.args[0] if node.target in DEQUANTIZE else None
    if isinstance(source, Node) and source.target in QUANTIZE and source.args[1:] != node.args[1 : len(source.args)]:
        return f"its parameters are not those of its quantize '{source.name}'"
    return None


def _one_consumer(node: Node) -> str | None:
    if node.target in DEQUANTIZE and len(consumers(node)) > 1:
        return f"it has {len(consumers(node))} consumers; every consumer has a dequantize of its own"
    return None


LEGAL: tuple[tuple[str, Callable[[Node], str | None]], ...] = (
    ("no observer is left", _no_observer_left),
    ("only float tensors are quantized", _quantizes_float),
    ("a dequantize undoes its quantize", _dq_undoes_q),
    ("one consumer per dequantize", _one_consumer),
    *PARAMETER_RULES,
)
"""The rules of a legal Q/DQ graph."""


def problems(gm: GraphModule) -> list[str]:
    """Everything that is wrong with a Q/DQ graph, one line each; empty when it is legal."""
    return [
        f"{where(node)}: {wrong} (rule: {name})"
        for _, graph in graphs_of(gm)
        for node in graph.graph.nodes
        for name, rule in LEGAL
        if (wrong := rule(node)) is not None
    ]


def check_legality(gm: GraphModule) -> None:
    """Raise `PassError` with every problem of a Q/DQ graph."""
    found = problems(gm)
    if found:
        raise PassError("the converted graph is not legal:\n" + "\n".join(f"  {line}" for line in found))
