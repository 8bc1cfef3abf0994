"""Writes in place, and who would miss them.

A quantized operand is a copy: what an op writes into it, nobody else sees. That is no loss when nobody else looks
(``relu_(conv(x))``), and a wrong result when somebody does (a buffer, an input, a view of the same tensor).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set as AbstractSet

from torch.fx import Graph, Node

from quant2e.passes.constants import Memory, memories
from quant2e.passes.effects import writes


def written_in_sight(graph: Graph) -> dict[Node, Node]:
    """Nodes whose tensor is written in place later on, where others see it; with the node that writes.

    None of them may be quantized. A graph that writes nothing costs one look at each node.
    """
    writers = [(node, operand) for node in graph.nodes for operand in writes(node)]
    if not writers:
        return {}
    position = {node: i for i, node in enumerate(graph.nodes)}
    memory = memories(graph)
    sharing: dict[Memory, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for place in memory[node]:
            sharing[place].append(node)
    found: dict[Node, Node] = {}
    for writer, operand in writers:
        earlier = {n for place in memory[operand] for n in sharing[place] if position[n] < position[writer]}
        if not _private(earlier, operand, writer, position):
            for node in earlier:
                found.setdefault(node, writer)
    return found


def _private(sharing: AbstractSet[Node], operand: Node, writer: Node, position: dict[Node, int]) -> bool:
    """Whether the nodes that share the written memory are a chain of the graph's own, read by none after the write."""
    for node in sharing:
        if node.op != "call_function":
            return False
        heirs = [user for user in node.users if user in sharing]
        if len(heirs) != (0 if node is operand else 1):
            return False
        if any(position[user] > position[writer] for user in node.users if user not in sharing):
            return False
    return True
