"""Bodies of control flow in comparisons: they are compared as a whole, so that nothing in them rounds or learns.

cond(p, f', g', x)        =>        cond(p, f, g, x)        f and g without the observers of f' and g'
"""

from __future__ import annotations

from torch.fx import GraphModule

from quant2e.graph.control_flow import graphs_of
from quant2e.observers.base import is_observer_call


def drop_observers_inside(gm: GraphModule) -> GraphModule:
    """Drop the observers in the bodies of ``gm``, a copy that shares theirs with a prepared graph; returns ``gm``."""
    for _, body in list(graphs_of(gm))[1:]:
        for call in [node for node in body.graph.nodes if is_observer_call(node)]:
            call.replace_all_uses_with(call.all_input_nodes[0])
            body.graph.erase_node(call)
        body.recompile()
    return gm
