"""Channel walk: one pass over a graph that labels every tensor with the factors its channels could take.

    y = conv(x, w, b)        s·y = conv(x, s·w, s·b)        a new label for each row of w
    y = relu(x)              s·y = relu(s·x)                the labels of x
    y = add(a, b)            s·y = add(s·a, s·b)            a and b have the same labels from now on
    y = conv(s·x, w/s)                                      a label for each column of w, the same as that of x
    y = softmax(x)                                          the labels of x are 0: nothing may be on it

Labels are only ever joined, so the order of the ops does not matter, and neither do residuals or several readers.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quant2e.accuracy.algorithms.channels.labels import Labels, aligned, tidy
from quant2e.graph.attributes import attribute, tensor_at
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.control_flow import graphs_of
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import is_float


@dataclass(frozen=True, slots=True, eq=False)
class FactorTerm:
    """Factors on a constant: ``labels`` broadcast against it; ``sign`` 1: it is multiplied by them, -1: divided."""

    labels: Tensor
    sign: int


@dataclass(slots=True, eq=False)
class Parameter:
    """A constant that ops read in one role, and the factors on it.

    ``places``: which op reads it under which name. ``value``: the tensor, or ones of its shape where an op has none.
    """

    value: Tensor
    places: tuple[tuple[Node, str], ...]
    terms: dict[str, FactorTerm] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Strength:
    """How strongly an op makes and reads channels: ``size``, not negative, with labels that broadcast against it.

    Of an op with a weight matrix its absolute values; of a norm or a factor, about the largest of its result.
    ``source``: the tensor that is read.
    """

    node: Node
    size: Tensor
    makes: Tensor
    reads: Labels = None
    source: Node | None = None
    is_matrix: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Stop:
    """Labels that are 0, because of what a node does."""

    labels: Tensor
    node: Node
    why: str


class Walk:
    """The state of one pass; the rules are in `rules` and `layers`, beside it."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.constants = Constants(gm.graph)
        self.labels: dict[Node, Labels] = {}
        self.parts: dict[Node, list[Labels]] = {}
        self.parameters: dict[Hashable, Parameter] = {}
        self.strengths: dict[Node, Strength] = {}
        self.clamps: dict[Node, Tensor] = {}
        self.joined: list[Tensor] = []
        self.stops: list[Stop] = []
        self._count = itertools.count(1)
        self._known: dict[Node, object] = {}
        self._uses = _uses(gm, self.constants)
        self._axes: dict[tuple[int, str], Tensor] = {}

    def of(self, node: object) -> Labels:
        """Labels of what is read; None for literals."""
        return self.labels.get(node) if isinstance(node, Node) else None

    def fresh(self, *sizes: int) -> Tensor:
        """New labels."""
        count = torch.Size(sizes).numel()
        return torch.tensor([next(self._count) for _ in range(count)], dtype=torch.int64).reshape(sizes)

    def join(self, a: Labels, b: Labels) -> Labels:
        """Let two tensors that are added up have the same labels; the labels of the sum."""
        if a is None and b is None:
            return None
        one = torch.zeros(1, dtype=torch.int64) if a is None else a
        other = torch.zeros(1, dtype=torch.int64) if b is None else b
        rank = max(one.dim(), other.dim())
        pairs = torch.broadcast_tensors(aligned(one, rank), aligned(other, rank))
        if not torch.equal(*pairs):
            self.joined.append(torch.stack([pair.flatten() for pair in pairs]))
        return tidy(pairs[0])

    def stop(self, labels: Labels, node: Node, why: str) -> None:
        """Let labels be 0, because of ``node``; without ``why`` nobody is told."""
        if labels is not None:
            self.stops.append(Stop(labels.unique(), node, why))

    def value(self, node: Node) -> Tensor:
        """The value of a constant."""
        value = evaluate(self.gm, node, self._known)
        assert isinstance(value, Tensor)
        return value.detach()

    def parameter(self, node: Node, name: str) -> Parameter | str:
        """The constant that an op reads under a name, as one that factors can be put on; or why not."""
        source = operand(node, name)
        if not isinstance(source, Node) or source not in self.constants:
            return f"its {name} is not constant"
        if not is_float(source):
            return f"its {name} holds no floats"
        leaves = self._uses.leaves[source]
        roles = {role for leaf in leaves for role in self._uses.roles[leaf]}
        if len(roles) != 1:
            others = sorted({reader.name for leaf in leaves for reader in self._uses.readers[leaf]} - {node.name})
            return f"its {name} is also read by {', '.join(others[:3]) or 'it, in another place'}"
        key = self._uses.key(source)
        if key not in self.parameters:
            readers = [reader for leaf in leaves for reader in self._uses.readers[leaf]]
            self.parameters[key] = Parameter(self.value(source), tuple((reader, name) for reader in readers))
        return self.parameters[key]

    def absent(self, node: Node, name: str, like: Tensor) -> Parameter:
        """A parameter that an op does not have and could have: ones."""
        return self.parameters.setdefault((node, name), Parameter(torch.ones_like(like), ((node, name),)))

    def axis(self, parameter: Parameter, role: str, sizes: Sequence[int]) -> Tensor:
        """Labels of one axis of a parameter, new ones the first time: all calls of a shared layer have the same."""
        key = (id(parameter), role)
        if key not in self._axes:
            self._axes[key] = self.fresh(*sizes)
        return self._axes[key]


class _Uses:
    """Who reads each tensor of a module, in which role: as which operand of which op."""

    def __init__(self) -> None:
        self.leaves: dict[Node, frozenset[int]] = {}
        self.roles: dict[int, set[Hashable]] = defaultdict(set)
        self.readers: dict[int, dict[Node, None]] = defaultdict(dict)

    @staticmethod
    def key(source: Node) -> Hashable:
        """The tensor that a node reads, or the node that computes it."""
        module = source.graph.owning_module
        tensor = None if module is None else tensor_at(module, source)
        return source if tensor is None else id(tensor)


def _uses(gm: GraphModule, constants: Constants) -> _Uses:
    found = _Uses()
    for node in gm.graph.nodes:
        tensor = tensor_at(gm, node)
        own = frozenset() if tensor is None else frozenset({id(tensor)})
        found.leaves[node] = own.union(*(found.leaves[x] for x in node.all_input_nodes if x in constants))
    for node in gm.graph.nodes:
        if node in constants:
            continue
        for source in node.all_input_nodes:
            for leaf in found.leaves[source] if source in constants else ():
                found.roles[leaf].add((found.key(source), node.target, _names(node, source)))
                found.readers[leaf][node] = None
    for _, body in list(graphs_of(gm))[1:]:
        for node in body.graph.nodes:
            if node.op == "get_attr" and isinstance(value := attribute(body, str(node.target), None), Tensor):
                found.roles[id(value)].add(node)
    return found


def _names(node: Node, source: Node) -> tuple[Hashable, ...]:
    """As which operands a node reads another, and what else decides how an axis of it is laid out."""
    places = [place for place, arg in enumerate(node.args) if arg is source]
    names = [name for name, arg in node.kwargs.items() if arg is source]
    nested = 0

    def count(arg: Node) -> Node:
        nonlocal nested
        nested += arg is source
        return arg

    map_arg((node.args, node.kwargs), count)
    groups = operand(node, "groups")
    return (*places, *names, nested - len(places) - len(names), groups if isinstance(groups, int) else None)
