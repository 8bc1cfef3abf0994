"""Float graphs from prepared ones, in comparisons: without observers, so that nothing in them rounds or learns.

f(observer(x))        =>        f(x)
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import GraphModule

from quant2e.observers.base import is_observer_call


def drop_observers(graphs: Iterable[GraphModule]) -> None:
    """Drop the calls of observers from graphs, in place; copies, which share observers with a prepared graph."""
    for gm in graphs:
        for call in [node for node in gm.graph.nodes if is_observer_call(node)]:
            call.replace_all_uses_with(call.all_input_nodes[0])
            gm.graph.erase_node(call)
        gm.recompile()
