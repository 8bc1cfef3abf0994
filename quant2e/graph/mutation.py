"""Mutation analysis: which memory nodes share, and which in-place writes are observable.

observable(w)  ⇔  the memory that w writes is read after w other than through its result, or is not the graph's own

A quantized operand is a copy: what an op writes into it, nobody else sees. That is no loss when nobody else looks
(``relu_(conv(x))``), and a wrong result when somebody does (a buffer, an input, a view of the same tensor).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node

from quant2e.graph.attributes import attribute
from quant2e.graph.effects import aliases, is_view, writes
from quant2e.stored_tensor import StoredTensor

Storage = tuple[str, Any] | Node
"""What tells one piece of memory from another: a tensor's storage, or the node that allocated it."""


def storage_of(node: Node, known: Mapping[Node, frozenset[Storage]]) -> frozenset[Storage]:
    """Where the value of ``node`` may live, when that is ``known`` of the nodes it may share memory with."""
    if node.op == "get_attr":
        module, path = node.graph.owning_module, str(node.target)
        value = None if module is None else attribute(module, path)
        return frozenset({_storage(value) if isinstance(value, Tensor) else ("path", path)})
    shared = [known[base] for base in aliases(node)]
    return shared[0].union(*shared[1:]) if shared else frozenset({node})


def _storage(tensor: Tensor) -> Storage:
    real = tensor.layout == torch.strided and not isinstance(tensor, FakeTensor | StoredTensor)
    pointer = tensor.untyped_storage().data_ptr() if real else 0
    return ("storage", pointer) if pointer else ("tensor", id(tensor))


def storages(graph: Graph) -> dict[Node, frozenset[Storage]]:
    """For each node, the memory its value may live in. Two parameters that are one tensor have one storage."""
    found: dict[Node, frozenset[Storage]] = {}
    for node in graph.nodes:
        found[node] = storage_of(node, found)
    return found


def written_nodes(graph: Graph) -> set[Node]:
    """Nodes whose tensor some node writes in place, under whatever name."""
    written = [operand for node in graph.nodes for operand in writes(node)]
    if not written:
        return set()
    memory = storages(graph)
    places = frozenset[Storage]().union(*(memory[operand] for operand in written))
    return {node for node in graph.nodes if not memory[node].isdisjoint(places)}


def seen_through(writer: Node) -> Node | None:
    """By what other name than its operand and its result somebody may see what an in-place op writes, if any.

    A parameter, buffer or input; a view of the operand; what the operand is a view of, where that is read later or
    viewed again. None for ops that return something else than what they write, as norms do that update statistics. As
    the graph is now: costs a look at the operand's views and at what it is a view of.
    """
    returned = set(aliases(writer))
    names = (_other_name(node, writer, {}) for node in writes(writer) if node in returned)
    return next(filter(None, names), None)


@dataclass(frozen=True, slots=True)
class _Bases:
    """What a node is a view of, up to where the memory comes from.

    ``name``: one that somebody may always see the memory by. ``read``: of the others, the one that is read last, and
    there.
    """

    name: Node | None = None
    read: tuple[Node, Node] | None = None


def _bases(node: Node, known: dict[Node, _Bases]) -> _Bases:
    """Each node is looked at once, whatever is asked about a graph that stays as it is.
    Iterative: chains can be long.
    """
    pending = [node]
    while pending:
        above = [base for base in aliases(pending[-1]) if base not in known]
        pending.extend(above)
        if not above:
            done = pending.pop()
            known[done] = _look(done, known) if done.op == "call_function" else _Bases(name=done)
    return known[node]


def _look(node: Node, known: Mapping[Node, _Bases]) -> _Bases:
    read: tuple[Node, Node] | None = None
    for base in aliases(node):
        others = [user for user in base.users if user is not node]
        name = next((user for user in others if base in aliases(user)), known[base].name)
        if name is not None:
            return _Bases(name=name)
        for place in ((user, base) for user in others):
            read = place if read is None or place[0] > read[0] else read
        above = known[base].read
        read = above if read is None or (above is not None and above[0] > read[0]) else read
    return _Bases(read=read)


def _other_name(operand: Node, writer: Node, known: dict[Node, _Bases]) -> Node | None:
    for user in operand.users:
        if user is not writer and is_view(user) and operand in aliases(user):
            return user
    bases = _bases(operand, known)
    return bases.read[1] if bases.read is not None and bases.read[0] > writer else bases.name


def observed_writes(node: Node) -> list[Node]:
    """Nodes whose tensor ``node`` changes in place where that is seen: by another name, or by reading it afterwards.

    What is written to memory of the graph's own, and read through the writer's result only, is seen by nobody.
    """
    return [operand for operand in writes(node) if _is_seen(operand, node, {})]


def _is_seen(operand: Node, writer: Node, known: dict[Node, _Bases]) -> bool:
    return _other_name(operand, writer, known) is not None or any(user > writer for user in operand.users)


def all_observed_writes(graph: Graph) -> list[tuple[Node, Node]]:
    """Every writer of a graph with what it writes, as `observed_writes` gives it. Linear in the number of nodes."""
    known: dict[Node, _Bases] = {}
    return [(node, operand) for node in graph.nodes for operand in writes(node) if _is_seen(operand, node, known)]


@dataclass(frozen=True, slots=True)
class ObservableWrite:
    """A tensor that is written in place where others see it.

    ``consumers`` must get the tensor itself, not a copy: what writes it, what reads it afterwards, what makes a view.
    """

    writer: Node
    consumers: frozenset[Node]


def observable_writes(graph: Graph) -> dict[Node, ObservableWrite]:
    """For every node whose tensor is written in place later on, where others see it: who writes and who must see it.

    A graph that writes nothing costs one look at each node.
    """
    writers = all_observed_writes(graph)
    if not writers:
        return {}
    position = {node: i for i, node in enumerate(graph.nodes)}
    memory = storages(graph)
    sharing: dict[Storage, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for place in memory[node]:
            sharing[place].append(node)
    found: dict[Node, ObservableWrite] = {}
    for writer, operand in writers:
        earlier = {n for place in memory[operand] for n in sharing[place] if position[n] < position[writer]}
        for node in earlier:
            known = found.get(node, ObservableWrite(writer, frozenset()))
            seeing = (u for u in node.users if u in earlier or position[u] >= position[writer])
            found[node] = ObservableWrite(known.writer, known.consumers.union(seeing))
    return found


def written_attributes(gm: GraphModule) -> dict[str, Tensor]:
    """Parameters and buffers that the graph of ``gm`` writes, also through a view, by path."""
    written = written_nodes(gm.graph)
    paths = [str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and n in written]
    values = {path: attribute(gm, path) for path in paths}
    return {path: value for path, value in values.items() if isinstance(value, Tensor)}


def first_writer(gm: GraphModule) -> Node | None:
    """The first node that writes to a parameter or buffer of ``gm``; None where nothing does."""
    memory = storages(gm.graph)
    paths = written_attributes(gm)
    state = frozenset[Storage]().union(
        *(memory[node] for node in gm.graph.nodes if node.op == "get_attr" and str(node.target) in paths)
    )
    touched = ((node, operand) for node in gm.graph.nodes for operand in writes(node))
    return next((node for node, operand in touched if not memory[operand].isdisjoint(state)), None)


def clone_together(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """A detached copy of every tensor, by its id.
    Where tensors share memory (one is a view of another), so do the copies.
    """
    distinct = {id(tensor): tensor for tensor in tensors}
    sharing = Counter(map(_storage, distinct.values()))
    memory: dict[Storage, torch.UntypedStorage] = {}
    copies = {}
    for key, tensor in distinct.items():
        place = _storage(tensor)
        if sharing[place] == 1:
            copies[key] = tensor.detach().clone()
            continue
        if place not in memory:
            memory[place] = tensor.untyped_storage().clone()
        empty = tensor.detach().new_empty(0)
        copies[key] = empty.set_(memory[place], tensor.storage_offset(), tensor.size(), tensor.stride())
    return copies


def own_written_tensors(gm: GraphModule) -> None:
    """Give ``gm`` its own copies of what its graph writes, so that running it changes nobody else's tensors."""
    written = written_attributes(gm)
    copies = clone_together(written.values())
    for path, value in written.items():
        parent, _, name = path.rpartition(".")
        owner = gm.get_submodule(parent)
        table: dict[str, Any] = next((t for t in (owner._parameters, owner._buffers) if name in t), owner.__dict__)
        copy = copies[id(value)]
        table[name] = nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy


def own_tensors(gm: GraphModule, *, trainable: bool = True) -> None:
    """Give ``gm`` its own copies of all its tensors, so that training it, or what it came from, changes no other model.

    Tied parameters stay tied. ``trainable=False``: parameters lose their gradients.
    """
    tables: list[dict[str, Any]] = [
        table for module in gm.modules() for table in (module._parameters, module._buffers, vars(module))
    ]
    tensors = {id(v): v for table in tables for v in table.values() if isinstance(v, Tensor)}
    copies = clone_together(tensors.values())
    for key, value in tensors.items():
        if isinstance(value, nn.Parameter):
            copies[key] = nn.Parameter(copies[key], value.requires_grad and trainable)
    for table in tables:
        for name, value in table.items():
            if isinstance(value, Tensor):
                table[name] = copies[id(value)]
