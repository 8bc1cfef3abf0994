"""Writes in place: those that nobody sees become plain ops, and what the others write to is no region's.

relu_(x), seen by nobody else        =>        relu(x)
relu_(v), v a view of x              =>        relu_(v): x, v and what they share memory with stay as they are, in order
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from quant2e.graph.effects import is_random, writes
from quant2e.graph.mutation import Storage, storages
from quant2e.integer.functionalize import use_functional_ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Writes:
    """``writers``: of each node whose memory is written in place, one that writes to it.

    ``before``: of each op that keeps its place among others, the one before it. A region is called where its first
    reader stands; what reads or writes such memory, or draws random numbers, does so in the order of the graph.
    """

    writers: Mapping[Node, Node]
    before: Mapping[Node, Node]

    def refusal(self, nodes: Iterable[Node]) -> str | None:
        """Why no region computes with ``nodes``; None where one may."""
        writer = next((self.writers[node] for node in nodes if node in self.writers), None)
        return None if writer is None else f"'{writer.name}' writes in place to memory that others see as well"


NO_WRITES = Writes(writers={}, before={})


def keep_writes(gm: GraphModule) -> Writes:
    """Put plain ops in the place of in-place ops of ``gm`` whose write is seen by nobody; what is left of them."""
    use_functional_ops(gm)
    memory, first = storages(gm.graph), dict[Storage, Node]()
    for node in gm.graph.nodes:
        for place in frozenset[Storage]().union(*(memory[operand] for operand in writes(node))):
            first.setdefault(place, node)
    writers = {node: first[place] for node in gm.graph.nodes for place in memory[node] if place in first}
    ordered = [node for node in gm.graph.nodes if _keeps_place(node, writers)]
    return Writes(writers=writers, before={node: ahead for ahead, node in itertools.pairwise(ordered)})


def _keeps_place(node: Node, writers: Mapping[Node, Node]) -> bool:
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    touches = node in writers or any(operand in writers for operand in node.all_input_nodes)
    return touches or node.op == "call_module" or is_random(node)
