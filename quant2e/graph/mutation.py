"""Writes in place, and who would miss them.

A quantized operand is a copy: what an op writes into it, nobody else sees. That is no loss when nobody else looks
(``relu_(conv(x))``), and a wrong result when somebody does (a buffer, an input, a view of the same tensor).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from quant2e.graph.attributes import attribute
from quant2e.graph.constants import Memory, memories
from quant2e.graph.effects import writes


@dataclass(frozen=True, slots=True)
class WrittenInSight:
    """A tensor that is written in place where others see it.

    ``consumers`` must get the tensor itself, not a copy: what writes it, what reads it afterwards, what makes a view.
    """

    writer: Node
    consumers: frozenset[Node]


def written_in_sight(graph: Graph) -> dict[Node, WrittenInSight]:
    """For every node whose tensor is written in place later on, where others see it: who writes and who must see it.

    A graph that writes nothing costs one look at each node.
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
    found: dict[Node, WrittenInSight] = {}
    for writer, operand in writers:
        earlier = {n for place in memory[operand] for n in sharing[place] if position[n] < position[writer]}
        if _private(earlier, operand, writer, position):
            continue
        for node in earlier:
            known = found.get(node, WrittenInSight(writer, frozenset()))
            seeing = (u for u in node.users if u in earlier or position[u] >= position[writer])
            found[node] = WrittenInSight(known.writer, known.consumers.union(seeing))
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


def written_attributes(gm: GraphModule) -> dict[str, Tensor]:
    """Parameters and buffers that the graph of ``gm`` writes, also through a view, by path."""
    memory = memories(gm.graph)
    written = set().union(*(memory[operand] for node in gm.graph.nodes for operand in writes(node)))
    paths = [str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and not memory[n].isdisjoint(written)]
    values = {path: attribute(gm, path) for path in paths}
    return {path: value for path, value in values.items() if isinstance(value, Tensor)}


def own_written_tensors(gm: GraphModule) -> None:
    """Give ``gm`` its own copies of what its graph writes, so that running it changes nobody else's tensors."""
    copies: dict[int, Tensor] = {}
    for path, value in written_attributes(gm).items():
        if id(value) not in copies:
            copies[id(value)] = value.detach().clone()
        parent, _, name = path.rpartition(".")
        owner = gm.get_submodule(parent)
        table: dict[str, Any] = next((t for t in (owner._parameters, owner._buffers) if name in t), owner.__dict__)
        copy = copies[id(value)]
        table[name] = nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy


def own_tensors(gm: GraphModule, *, trainable: bool = True) -> None:
    """Give ``gm`` its own copies of all its tensors, so that training it, or what it came from, changes no other model.

    Tied parameters stay tied. ``trainable=False``: parameters lose their gradients.
    """
    copies: dict[int, Tensor] = {}

    def own(value: Tensor) -> Tensor:
        if id(value) not in copies:
            copy = value.detach().clone()
            if isinstance(value, nn.Parameter):
                copy = nn.Parameter(copy, value.requires_grad and trainable)
            copies[id(value)] = copy
        return copies[id(value)]

    for module in gm.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for table in tables:
            for name, value in table.items():
                if isinstance(value, Tensor):
                    table[name] = own(value)
