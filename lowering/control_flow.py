"""Control flow in programs: which ops a target takes, and what a report says of the graphs inside.

A body is a graph of its own, to which weights come as operands: kernels that pack constant weights do not apply there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch.fx import GraphModule, Node

from quant2e.errors import LoweringError, where
from quant2e.graph.control_flow import bodies, control_flow, graphs_of
from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE

INSIDE = "inside a body of control flow, to which weights come as operands: floats between dequantize and quantize"
"""Why an op with quantized operands has no integer kernel."""


def ops_inside(graph: GraphModule) -> Iterator[tuple[str, Node]]:
    """The calls in the bodies of ``graph``, each with the path of its body, without quantize and dequantize."""
    for path, body in list(graphs_of(graph))[1:]:
        for node in body.graph.nodes:
            if node.op == "call_function" and node.target not in QUANTIZE | DEQUANTIZE | CHOOSE_QPARAMS:
                yield path, node


def refuse_control_flow(graph: GraphModule, taken: Collection[str], target: str, advice: str) -> None:
    """Raise `LoweringError` for the first control flow of ``graph``, or of its bodies, that is none of ``taken``."""
    for _, one in graphs_of(graph):
        for node in one.graph.nodes:
            flow = control_flow(node)
            if flow is not None and flow.op.name() not in taken:
                held = ", ".join(taken) or "no control flow"
                raise LoweringError(f"{target} runs {held}, and not {where(node)}. {advice}")


def refuse_integers_inside(graph: GraphModule, target: str) -> None:
    """Raise `LoweringError` naming a quantized op in a body of ``graph``: ``target`` has none there."""
    for path, body in list(graphs_of(graph))[1:]:
        for node in body.graph.nodes:
            if node.target in DEQUANTIZE:
                reader = next(iter(node.users))
                raise LoweringError(
                    f"{target} holds integers in the outer graph only, and {where(reader)} in '{path}' is quantized: "
                    f"leave what lies in bodies of control flow float, by set_node('{path}.{reader.name}', None) or by "
                    "the name of a module"
                )


def notes_on_branches(graph: GraphModule) -> tuple[str, ...]:
    """A sentence where not all of ``graph`` is compared with the program: a run takes one branch."""
    found = [node for _, one in graphs_of(graph) for node in one.graph.nodes if _branches(node)]
    if not found:
        return ()
    told = "only the branches that the inputs take are compared with the graph; verify_inputs adds others"
    return (f"{where(found[0])}: {told}",)


def _branches(node: Node) -> bool:
    return control_flow(node) is not None and str(node.target) == "cond" and bool(bodies(node))
