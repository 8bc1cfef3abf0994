"""Control flow: ops that run bodies, graphs of their own, once for each branch taken, step or slice.

    cond(p, f, g, [x])              f(x) if p else g(x)
    while_loop(p, f, [c], [x])      c = f(c, x) while p(c, x)
    scan(f, [c], [xs], [x])         c, y = f(c, xs[i], x) for each i; the last c, and all y
    map_impl(f, [xs], [x])          f(xs[i], x) for each i

torch.export hands a body all that it reads, parameters too, as operands. A quantizer must see parameters as such, so
`hold_constants` moves them into the body and `hand_constants` out again. Between the two the op is a function of Python
(`run_in_python`): what the bodies hold then gets gradients, and modules that they call keep their state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Interpreter, Node

from quant2e.graph.attributes import attribute, register_tensor, replace_tensor, tensor_at

BODY = "quant2e_body"
"""Key in the ``meta`` of a body's graph while it is quantized: its path in the program."""

Body = Callable[..., Sequence[Any]]


def cond(predicate: Any, true: Body, false: Body, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of one of two branches."""
    return true(*operands) if predicate else false(*operands)


def while_loop(go_on: Callable[..., Any], body: Body, carried: Sequence[Any], fixed: Sequence[Any]) -> Sequence[Any]:
    """What is carried from step to step, after the last one."""
    steps = 0
    while go_on(*carried, *fixed):
        carried = body(*carried, *fixed)
        steps += 1
    return carried if steps else tuple(x.clone() if isinstance(x, Tensor) else x for x in carried)


def scan(
    body: Body,
    carried: Sequence[Any],
    xs: Sequence[Tensor],
    fixed: Sequence[Any],
    mutated_arg_indices: str = "",  # noqa: ARG001  # which operands the body writes to, says torch 2.14: it does so here
) -> Sequence[Any]:
    """What is carried, after the last slice of ``xs`` along dimension 0, and the other results of all, stacked."""
    count, made = len(carried), []
    for slices in zip(*(x.unbind() for x in xs), strict=True):
        results = body(*carried, *slices, *fixed)
        carried = results[:count]
        made.append(results[count:])
    return *carried, *(_stacked(each) for each in zip(*made, strict=True))


def map_impl(
    body: Body,
    xs: Sequence[Tensor],
    fixed: Sequence[Any],
    mutated_arg_indices: str = "",  # noqa: ARG001  # as for `scan`
) -> Sequence[Any]:
    """The results for all slices of ``xs`` along dimension 0, stacked."""
    return [
        _stacked(each)
        for each in zip(*(body(*slices, *fixed) for slices in zip(*map(torch.unbind, xs), strict=True)), strict=True)
    ]


def _stacked(values: Sequence[Any]) -> Tensor | None:
    return None if values[0] is None else torch.stack(list(values))


@dataclass(frozen=True, slots=True)
class ControlFlow:
    """One op: its form in Python, and the places among its arguments of the bodies, of the lists of what they are
    called with, in order, and of the list of what is the same in every run (``fixed``).
    """

    op: HigherOrderOperator
    in_python: Callable[..., Any]
    bodies: tuple[int, ...]
    lists: tuple[int, ...]
    fixed: int


_OPS = torch.ops.higher_order
_ALL = (
    ControlFlow(_OPS.cond, cond, (1, 2), (3,), 3),
    ControlFlow(_OPS.while_loop, while_loop, (0, 1), (2, 3), 3),
    ControlFlow(_OPS.scan, scan, (0,), (1, 2, 3), 3),
    ControlFlow(_OPS.map_impl, map_impl, (0,), (1, 2), 2),
)
_KNOWN: Mapping[Any, ControlFlow] = {target: each for each in _ALL for target in (each.op, each.in_python)}


def form_in_python(op: object) -> Callable[..., Any] | None:
    """The function of Python that computes what a control-flow op does, of the same arguments; None for any other."""
    flow = _KNOWN.get(op)
    return None if flow is None else flow.in_python


def control_flow(node: Node) -> ControlFlow | None:
    """The control flow that a node is, as the op or in Python; None for any other."""
    return _KNOWN.get(node.target) if node.op == "call_function" else None


def has_bodies(node: Node) -> bool:
    """Whether a node may run graphs of their own: a higher-order op, or control flow in Python."""
    return isinstance(node.target, HigherOrderOperator) or control_flow(node) is not None


def bodies(node: Node) -> dict[str, GraphModule]:
    """The graphs that a node runs, by their paths in the module of its graph, in the order of its operands."""
    root = node.graph.owning_module
    if root is None or not has_bodies(node):
        return {}
    paths = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    found = {path: attribute(root, path, None) for path in paths}
    return {path: module for path, module in found.items() if isinstance(module, GraphModule)}


def graphs_of(gm: GraphModule, path: str = "") -> Iterator[tuple[str, GraphModule]]:
    """All graphs of a program: ``gm`` under ``path``, and the bodies in it, each in front of its own bodies.

    ``prefixed(path, name)`` is where an attribute of such a graph lies below the program.
    """
    yield path, gm
    seen: set[str] = set()
    for node in gm.graph.nodes:
        for name, body in bodies(node).items():
            if name not in seen:
                seen.add(name)
                yield from graphs_of(body, prefixed(path, name))


class GraphInterpreter(Interpreter):
    """Runs a graph node by node, its bodies too: `inside` makes what runs a body."""

    def fetch_attr(self, target: str) -> Any:
        """The tensor at a path, or a function that runs the body there."""
        value = super().fetch_attr(target)
        if not isinstance(value, GraphModule):
            return value
        inner = self.inside(target, value)
        return partial(inner.run, enable_io_processing=False)

    def inside(self, path: str, body: GraphModule) -> Interpreter:
        """The interpreter of the body at ``path``."""
        return GraphInterpreter(body)


def operands_of_bodies(node: Node) -> list[Any] | None:
    """What the bodies of a node are called with, by place, a tensor for its slices; None where it is not known."""
    flow = control_flow(node)
    if flow is None or node.kwargs:
        return None
    return [operand for place in flow.lists for operand in node.args[place]]  # type: ignore[union-attr]


def prefixed(path: str, name: str) -> str:
    """``name`` below the graph at ``path``."""
    return f"{path}.{name}" if path else name


def run_in_python(node: Node, *, wanted: bool) -> None:
    """Let a node be control flow in Python, or the op again."""
    flow = control_flow(node)
    assert flow is not None, "only control flow has two forms"
    node.target = flow.in_python if wanted else flow.op


def hold_constants(gm: GraphModule, node: Node, constants: frozenset[Node]) -> int:
    """Move those ``constants`` that a node hands to its bodies, in every run the same, into the bodies; how many.

    In place. A body holds the tensor itself, under the path that it has in ``gm``. Nothing else may run these bodies.
    """
    flow = control_flow(node)
    assert flow is not None, "only control flow has bodies of known operands"
    fixed = list(node.args[flow.fixed])  # type: ignore[arg-type]
    moved = [i for i, operand in enumerate(fixed) if operand in constants and tensor_at(gm, operand) is not None]
    operands = operands_of_bodies(node) or []
    before = len(operands) - len(fixed)  # what is fixed comes last
    for body in bodies(node).values():
        inputs = [each for each in body.graph.nodes if each.op == "placeholder"]
        for index in moved:
            _hold(body, inputs[before + index], str(fixed[index].target), tensor_at(gm, fixed[index]))
        body.recompile()
    _set_fixed(node, flow, [operand for i, operand in enumerate(fixed) if i not in moved])
    return len(moved)


def _hold(body: GraphModule, placeholder: Node, path: str, value: Any) -> None:
    if placeholder.users:
        path = register_tensor(body, path, value)
        if isinstance(value, nn.Parameter):
            replace_tensor(body, path, value)
        with body.graph.inserting_before(placeholder):
            held = body.graph.get_attr(path)
        held.meta.update(placeholder.meta)
        placeholder.replace_all_uses_with(held)
    body.graph.erase_node(placeholder)


def hand_constants(gm: GraphModule, node: Node) -> int:
    """Move the tensors that the bodies of a node hold into ``gm``, which hands them over as operands; how many.

    In place, the inverse of `hold_constants`. Equal tensors of one path are one tensor of ``gm``. None has gradients
    any more: with them, torch traces the backward of a body before it runs it.
    """
    flow = control_flow(node)
    assert flow is not None, "only control flow has bodies of known operands"
    found = bodies(node)
    held: dict[str, list[tuple[Node, Tensor]]] = {}
    for body in found.values():
        for each in list(body.graph.nodes):
            if (value := tensor_at(body, each)) is not None:
                held.setdefault(_path_for(gm, str(each.target), value), []).append((each, value))
    handed = []
    for path, readers in held.items():
        value = readers[0][1]
        with gm.graph.inserting_before(node):
            handed.append(gm.graph.get_attr(path))
        handed[-1].meta.update(readers[0][0].meta)
        for body in found.values():
            _take_operand(body, [each for each, _ in readers if each.graph is body.graph], path, value)
    for body in found.values():
        _let_go(body)
        body.recompile()
    _set_fixed(node, flow, [*node.args[flow.fixed], *handed])  # type: ignore[misc]
    return len(handed)


def _let_go(body: GraphModule) -> None:
    """Drop what a body holds and reads no more: all but the bodies in it."""
    kept = {path for each in body.graph.nodes for path in bodies(each)}
    body._parameters.clear()
    body._buffers.clear()
    for name in [name for name in body._modules if name not in kept]:
        del body._modules[name]


def _set_fixed(node: Node, flow: ControlFlow, operands: Sequence[Any]) -> None:
    kind = tuple if isinstance(node.args[flow.fixed], tuple) else list  # torch adds them to others of the same type
    node.args = tuple(kind(operands) if place == flow.fixed else arg for place, arg in enumerate(node.args))


def _path_for(gm: GraphModule, path: str, value: Tensor) -> str:
    """Where ``gm`` holds the value of a body's ``path``; it is registered where it is new."""
    known = attribute(gm, path, None)
    if isinstance(known, Tensor) and (known is value or _equal(known, value)):
        if known.requires_grad:
            replace_tensor(gm, path, nn.Parameter(known.detach(), requires_grad=False))
        return path
    return register_tensor(gm, path, value.detach())


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and bool(torch.equal(a, b))


def _take_operand(body: GraphModule, readers: Sequence[Node], path: str, value: Tensor) -> None:
    """Let a body take as its last operand what ``readers`` read from it."""
    graph = body.graph
    last = [each for each in graph.nodes if each.op == "placeholder"][-1:]
    with graph.inserting_after(last[0]) if last else graph.inserting_before(next(iter(graph.nodes))):
        taken = graph.placeholder(re.sub(r"\W", "_", path, flags=re.ASCII))
    taken.target = taken.name
    taken.meta["val"] = readers[0].meta.get("val", value) if readers else value
    for each in readers:
        each.replace_all_uses_with(taken)
        graph.erase_node(each)
