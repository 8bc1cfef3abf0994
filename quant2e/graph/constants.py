"""Constant analysis: which nodes are constant, what makes the others vary, and the value of those that are.

constant(n)  ⇔  n reads a tensor that no observable write reaches,
                or n is deterministic, what it writes nobody else sees, and its operands are constant
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from quant2e.errors import PassError, where
from quant2e.graph.attributes import attribute
from quant2e.graph.control_flow import has_bodies
from quant2e.graph.effects import is_deterministic, writes
from quant2e.graph.mutation import Storage, all_observed_writes, observed_writes, storage_of, storages
from quant2e.stored_tensor import in_memory


class Cause(StrEnum):
    """What a node does that makes it, and what is computed from it, differ from call to call."""

    INPUT = "is an input"
    WRITES_BUFFER = "changes a buffer"
    WRITES_TENSOR = "changes a tensor in place"
    VARIES = "differs from call to call"
    CONTROL_FLOW = "chooses what to run"
    MODULE = "calls a module"
    NO_TENSOR = "is no tensor"


@dataclass(frozen=True, slots=True)
class Variation:
    """Why a node is not constant: the ``node`` it depends on, possibly itself, and what that one does."""

    node: Node
    cause: Cause

    def __str__(self) -> str:
        if self.cause is Cause.INPUT:
            return f"it depends on the input '{self.node.name}'"
        return f"it depends on {where(self.node)}, which {self.cause}"


class Constants:
    """The constant nodes of a graph, as a collection of them, and why the others vary.

    A node is constant when its value depends only on literals and on parameters and buffers that the graph never
    writes. A tensor that is written in place where others see it (also through a view, also under a second name) is
    not, nor is what a training-mode batch norm updates. Random and uninitialised tensors, control flow and modules are
    not.

    It is the graph as it is now: one walk, linear in the number of nodes. Nodes that a rewrite adds later can be asked
    for; after a rewrite that adds or removes writes, ask a new one. Raises `PassError` for a graph that reads what its
    module does not have.
    """

    def __init__(self, graph: Graph) -> None:
        self._storages = storages(graph)
        self._writers: dict[Storage, Node] = {}
        for writer, operand in all_observed_writes(graph):
            for place in self._storages[operand]:
                self._writers.setdefault(place, writer)
        self._variations: dict[Node, Variation | None] = {}
        for node in graph.nodes:
            self._variations[node] = self._variation(node)

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Node) and self.variation(node) is None

    def __iter__(self) -> Iterator[Node]:
        return (node for node, variation in self._variations.items() if variation is None)

    def variation(self, node: Node) -> Variation | None:
        """None if the value of ``node`` is constant; else what makes it vary, the first of its operands first."""
        pending = [] if node in self._variations else [node]
        while pending:
            new = [operand for operand in pending[-1].all_input_nodes if operand not in self._variations]
            pending.extend(new)
            if not new:
                known = pending.pop()
                self._storages[known] = storage_of(known, self._storages)
                self._variations[known] = self._variation(known)
        return self._variations[node]

    def _variation(self, node: Node) -> Variation | None:
        if node.op == "placeholder":
            return Variation(node, Cause.INPUT)
        operands = [v for operand in node.all_input_nodes if (v := self._variations[operand]) is not None]
        written = [self._writers[place] for place in self._storages[node] if place in self._writers]
        own = _own_cause(node)
        if (inherited := next((v for v in operands if v.cause is not Cause.NO_TENSOR), None)) is not None:
            return inherited
        if written:
            buffer = any(isinstance(place, tuple) for place in self._storages[node])
            return Variation(min(written), Cause.WRITES_BUFFER if buffer else Cause.WRITES_TENSOR)
        return Variation(node, own) if own is not None else next(iter(operands), None)


def _own_cause(node: Node) -> Cause | None:
    """What makes a node vary whose operands and whose memory do not."""
    if node.op == "get_attr":
        module = node.graph.owning_module
        is_tensor = module is None or isinstance(attribute(module, str(node.target)), Tensor)
        return None if is_tensor else Cause.NO_TENSOR
    if node.op == "call_module":
        return Cause.MODULE
    if has_bodies(node):
        return Cause.CONTROL_FLOW
    return None if is_deterministic(node) else Cause.VARIES


def evaluate(gm: GraphModule, node: Node, values: dict[Node, Any] | None = None) -> Any:
    """Value of a constant node (see `Constants`): usually a tensor, without gradient history.

    A node that only reads an attribute gives the attribute itself, not a copy, or what its file holds where it is a
    `StoredTensor`. Draws no random numbers.
    ``values`` keeps results between calls. Raises `PassError` when the node is not constant.
    """
    known: dict[Node, Any] = {} if values is None else values
    with torch.inference_mode(False), torch.no_grad():
        for step in _ancestors(node, known):
            if step.op == "get_attr":
                known[step] = in_memory(attribute(gm, str(step.target)))
            elif is_deterministic(step) and callable(step.target) and not observed_writes(step):
                known[step] = _call(step, known)
            else:
                raise PassError(f"{where(step)} is not constant, so the value of '{node.name}' is not known")
    return known[node]


def _call(node: Node, known: dict[Node, Any]) -> Any:
    """What ``node`` computes from ``known`` values, which stay as they are: it writes in place to copies."""
    written = writes(node)
    own = {operand: known[operand].clone() for operand in written} if written else {}
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda operand: own.get(operand, known[operand]))
    assert callable(node.target), "only calls are evaluated"
    return node.target(*args, **kwargs)


def _ancestors(node: Node, known: dict[Node, Any]) -> list[Node]:
    """``node`` and what it needs, operands first, without what is already known. Iterative: chains can be deep."""
    order: list[Node] = []
    seen = set(known)
    pending = [(node, False)]
    while pending:
        current, ready = pending.pop()
        if ready:
            order.append(current)
        elif current not in seen:
            seen.add(current)
            pending.append((current, True))
            pending.extend((operand, False) for operand in current.all_input_nodes)
    return order
