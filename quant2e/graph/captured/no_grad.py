"""Regions without gradients: what ``torch.no_grad()`` covers in a forward stays detached while its graph trains.

    f(x, p)  =  f(detach(x), detach(p))        in training, for every op f of such a region

Everything inside is then without history, so that no gradient reaches what the user froze, and a buffer that is updated
there (spectral norm) holds none. In evaluation nothing is detached, and patterns are found across the border.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from quant2e.graph.attributes import attribute
from quant2e.graph.edit import NO_GRAD, insert_call, stands_for
from quant2e.graph.effects import aten

_DETACHED = "quant2e_detached"
"""Key in the metadata of the nodes that are written here."""


def set_detached(graph: Graph, training: bool) -> bool:
    """Detach what enters regions without gradients of ``graph``, in training, or let it in as it is.

    In place; says whether anything changed. Going one way and back leaves the graph text as it was.
    """
    if not any(node.meta.get(NO_GRAD) for node in graph.nodes):
        return False
    return _detach(graph) if training else _attach(graph)


def set_all_detached(gm: GraphModule, training: bool) -> None:
    """`set_detached` for a captured graph and the bodies of its control flow, each compiled again if it changed."""
    for module in gm.modules():
        if isinstance(module, GraphModule) and set_detached(module.graph, training):
            module.recompile()


def _detach(graph: Graph) -> bool:
    made: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if not node.meta.get(NO_GRAD) or _DETACHED in node.meta:
            continue
        for operand in node.all_input_nodes:
            if not _may_have_gradient(operand):
                continue
            if operand not in made:
                made[operand] = insert_call(node, aten.detach.default, (operand,), value=operand.meta.get("val"))
                stands_for(made[operand], operand)
                made[operand].name = f"{operand.name}_detached"
                made[operand].meta.update({_DETACHED: True, NO_GRAD: True})
            node.replace_input_with(operand, made[operand])
    return bool(made)


def _attach(graph: Graph) -> bool:
    written = [node for node in graph.nodes if _DETACHED in node.meta]
    for node in written:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    return bool(written)


def _may_have_gradient(node: Node) -> bool:
    """Whether a node's value may have a history: a parameter, or a float tensor that is computed outside of regions."""
    if node.meta.get(NO_GRAD):
        return False
    if node.op == "get_attr":
        owner = node.graph.owning_module
        return owner is not None and isinstance(attribute(owner, str(node.target), None), nn.Parameter)
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
