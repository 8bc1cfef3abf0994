"""Repeated steps: what a recurrent layer does at every step is cut out as one graph, which is compiled once.

a = f(a0, x0);  b = f(a, x1);  c = f(b, x2);  …      =>      the same calls of `CompiledStep` f

A step begins behind one product with a weight and ends with the next product with that weight. Steps are cut out where
they compute the same from tensors of the same fixed sizes.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from lowering.inductor.kernels.compiled_step import CompiledStep, load_step_op
from lowering.inductor.rewrites.graph import op_of
from lowering.inductor.rewrites.weights import LINEAR, weight_of
from quant2e.graph.attributes import tensor_at
from quant2e.graph.constants import Constants
from quant2e.graph.edit import insert_call
from quant2e.graph.effects import is_deterministic, is_view, writes
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.qdq_ops import DEQUANTIZE

LEAST = 6
"""So many equal steps are worth a call for each."""


@dataclass(frozen=True, slots=True)
class StepRegion:
    """One step: ``nodes`` in an order that is the same for equal steps, the product last; ``operands`` from outside.

    ``form``: equal for steps that compute the same. ``results``: places of nodes that others read.
    """

    nodes: tuple[Node, ...]
    operands: tuple[Node, ...]
    form: tuple[str, ...]
    results: frozenset[int]


@dataclass(frozen=True, slots=True)
class RepeatedSteps:
    """A pass: cuts out repeated steps. ``made``: a graph for each kind of step; to be kept as long as the program."""

    made: list[CompiledStep] = field(default_factory=list)
    __name__: ClassVar[str] = "repeated_steps"

    def __call__(self, gm: GraphModule) -> int:
        """Rewrite every run of equal steps; returns how many steps there are.

        A graph that writes to tensors stays as it is: a call of a step would read them earlier.
        """
        if any(map(writes, gm.graph.nodes)):
            return 0
        contents, count = _Contents(gm), 0
        for weight in _weights_of_many(gm, contents):
            steps = _steps(gm, weight, contents)
            for _, run in itertools.groupby(steps, lambda step: step.form):
                equal = list(run)
                if len(equal) >= LEAST and (compiled := _cut(gm, equal)) is not None:
                    self.made.append(compiled)
                    count += len(equal)
        return count


class _Contents:
    """Constants by what they hold: equal ones have equal names here, wherever they are kept."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._known: dict[int, str] = {}

    def of(self, node: Node) -> str:
        value = tensor_at(self._gm, node)
        if value is None:
            return f"{node.target}"
        if id(value) not in self._known:
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            self._known[id(value)] = f"{_kind(value)} {hashlib.sha256(data).hexdigest()}"
        return self._known[id(value)]


def _kind(value: Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)} {value.stride()}"


def _weights_of_many(gm: GraphModule, contents: _Contents) -> list[str]:
    """Weights that more than `LEAST` products read. Only those that begin alike are looked at whole."""
    beginnings: dict[str, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        weight = _weight(gm, node)
        if weight is not None and (value := tensor_at(gm, weight)) is not None:
            beginnings[f"{_kind(value)} {value.flatten()[:64].tolist()}"].append(weight)
    alike = (weight for weights in beginnings.values() if len(weights) > LEAST for weight in weights)
    return [weight for weight, products in Counter(map(contents.of, alike)).items() if products > LEAST]


def _weight(gm: GraphModule, node: Node) -> Node | None:
    """The tensor that a product reads as its weight, dequantized or not; None for other ops."""
    weight = weight_of(node) if node.target in LINEAR else node.args[1] if _is_weight_only(node) else None
    if isinstance(weight, Node) and weight.target in DEQUANTIZE:
        weight = weight.args[0]
    return weight if isinstance(weight, Node) and tensor_at(gm, weight) is not None else None


def _is_weight_only(node: Node) -> bool:
    return str(node.target) == "quant2e.weight_only_linear.default"


def _steps(gm: GraphModule, weight: str, contents: _Contents) -> list[StepRegion]:
    """The steps between products with a weight; none where these do not follow each other."""
    products = [n for n in gm.graph.nodes if (w := _weight(gm, n)) is not None and contents.of(w) == weight]
    place = {node: number for number, node in enumerate(products, 1)}
    behind: dict[Node, int] = {}
    """How many of the products a node depends on."""
    for node in gm.graph.nodes:
        behind[node] = max((behind[source] for source in node.all_input_nodes), default=0)
        if node in place:
            behind[node] += 1
            if behind[node] != place[node]:
                return []
    constants = Constants(gm.graph)
    found = (_step(first, last, behind, constants, contents) for first, last in itertools.pairwise(products))
    return list(found)


def _step(first: Node, last: Node, behind: Mapping[Node, int], constants: Constants, contents: _Contents) -> StepRegion:
    inside = {last}
    waiting = [last]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in inside and source is not first and behind[source] == behind[first]:
                inside.add(source)
                waiting.append(source)
    grown = True
    while grown:
        around = {source for node in inside for source in node.all_input_nodes} - inside - {first}
        new = {node for node in around if node in constants or _serves(node, inside)}
        inside |= new
        grown = bool(new)
    nodes, operands = _in_order(last, inside)
    results = frozenset(
        index
        for index, node in enumerate(nodes)
        if node not in constants and any(user not in inside for user in node.users)
    )
    return StepRegion(nodes, operands, _form(nodes, operands, contents), results)


def _serves(node: Node, inside: set[Node]) -> bool:
    """Whether only the step reads a node, and it is a tensor made of tensors."""
    tensors = all(node_tensor(source) is not None for source in node.all_input_nodes)
    return node.op == "call_function" and tensors and all(user in inside for user in node.users)


def _in_order(last: Node, inside: set[Node]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """The nodes of a step, operands first, in the order in which ``last`` asks for them; and what they take."""
    nodes: dict[Node, None] = {}
    operands: dict[Node, None] = {}
    waiting = [(last, False)]
    while waiting:
        node, ready = waiting.pop()
        if node in nodes:
            continue
        if node not in inside:
            operands[node] = None
        elif ready:
            nodes[node] = None
        else:
            waiting.append((node, True))
            waiting.extend((source, False) for source in reversed(node.all_input_nodes))
    return tuple(nodes), tuple(operands)


def _form(nodes: Sequence[Node], operands: Sequence[Node], contents: _Contents) -> tuple[str, ...]:
    place = {node: f"%{index}" for index, node in enumerate((*operands, *nodes))}

    class Ref(str):
        __slots__ = ()
        __repr__ = str.__str__

    def form(node: Node) -> str:
        if node.op == "get_attr":
            return contents.of(node)
        spelled = map_arg((node.args, dict(node.kwargs)), lambda source: Ref(place[source]))
        return f"{node.target} {spelled!r}"

    return (*map(_look, operands), *map(form, nodes))


def _look(node: Node) -> str:
    value = node_tensor(node)
    return "" if value is None else _kind(value)


def _cut(gm: GraphModule, steps: Sequence[StepRegion]) -> CompiledStep | None:
    """Let one graph compute equal steps; None where they cannot be cut out."""
    first, results = steps[0], sorted(frozenset().union(*(step.results for step in steps)))
    values = [node_tensor(node) for node in first.operands]
    made = [node_tensor(first.nodes[index]) for index in results]
    if not all(map(_is_fixed, (*values, *made))) or any(is_view(first.nodes[index]) for index in results):
        return None
    if not all(node.op == "get_attr" or is_deterministic(node) for node in first.nodes):
        return None
    if not all(_is_early(step) for step in steps):
        return None
    names = [_names(first, step) for step in steps]
    compiled = CompiledStep(
        body=_body(gm, first, results),
        inputs=[value for value in values if value is not None],
        outputs=[value for value in made if value is not None],
        names=names,
    )
    replaced: dict[Node, Node] = {}
    for step in steps:
        _call(compiled, step, results, replaced)
    for step in steps:
        for node in reversed(step.nodes):
            if not node._erased and not node.users:
                gm.graph.erase_node(node)
    return compiled


def _is_fixed(value: Tensor | None) -> bool:
    return value is not None and all(type(size) is int for size in (*value.shape, *value.stride()))


def _is_early(step: StepRegion) -> bool:
    """Whether all that a step takes is there before anybody else reads what it makes."""
    last, inside = max(step.operands), set(step.nodes)
    return all(last < user for index in step.results for user in step.nodes[index].users if user not in inside)


def _names(first: StepRegion, step: StepRegion) -> dict[str, str]:
    return dict(zip(map(op_of, first.nodes), map(op_of, step.nodes), strict=True))


def _body(gm: GraphModule, step: StepRegion, results: Sequence[int]) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for index, node in enumerate(step.operands):
        copies[node] = graph.placeholder(f"operand_{index}")
        copies[node].meta["val"] = node.meta["val"]
    for node in step.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[step.nodes[index]] for index in results))
    return GraphModule(gm, graph)


def _call(compiled: CompiledStep, step: StepRegion, results: Sequence[int], replaced: dict[Node, Node]) -> None:
    operands = [replaced.get(node, node) for node in step.operands]
    place, inside = max(operands).next, set(step.nodes)
    call = insert_call(place, load_step_op(), (compiled.key, operands), origin=step.nodes[-1])
    for number, index in enumerate(results):
        node = step.nodes[index]
        result = insert_call(place, operator.getitem, (call, number), value=node.meta["val"], origin=node)
        for user in [user for user in node.users if user not in inside]:
            user.replace_input_with(node, result)
        replaced[node] = result
