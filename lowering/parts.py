"""Parts of a graph: copies that return other values of it, and compute what these need."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch.fx import GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from quant2e.graph.captured.module import CapturedModule, copy_graph
from quant2e.passes.dead_code import prune_unused_attributes, remove_dead_code


def returning(graph: GraphModule, values: Sequence[Node], kept: Collection[Node] | None = None) -> CapturedModule:
    """A copy of ``graph``, with the same inputs, that returns ``values`` as a tuple.

    ``kept``: the nodes to copy, every one of ``values`` and what it is computed from among them; inputs always are.
    What a copied node writes is written in the copy, too.
    """
    part = copy_graph(graph, compiled=False)
    named = {node.name: node for node in part.graph.nodes}
    output = next(node for node in reversed(part.graph.nodes) if node.op == "output")
    output.args = (tuple(named[value.name] for value in values),)
    output.meta.clear()
    for node in reversed(graph.graph.nodes):
        left_out = kept is not None and node not in kept and node.op not in ("output", "placeholder")
        if left_out and node.name in named:
            part.graph.erase_node(named[node.name])
    remove_dead_code(part)
    prune_unused_attributes(part)
    codegen = part.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        spec = pytree.tree_structure((0,) * len(values))
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    part.recompile()
    return part
