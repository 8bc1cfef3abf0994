"""Inlining of regions that change nothing about the numbers (``no_grad``, autocast that is off).

wrap_with_set_grad_enabled(_, body, *x)            =  body(*x)
wrap_with_autocast(_, _, False, _, body, *x)       =  body(*x)   outside of an enabled autocast region

``torch.no_grad()`` in a forward is exported as the first: a call that hides every op of the region from a quantizer.
What is inlined from there is marked (`NO_GRAD`), and stays without gradients in training: `graph.captured.no_grad`.
A region under enabled autocast computes in another dtype, so it stays, as do the bodies of control flow.
"""

from __future__ import annotations

import itertools
import operator

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument, map_arg

from quant2e.errors import PassError, where
from quant2e.graph.attributes import attribute, free_path
from quant2e.graph.control_flow import bodies as bodies_of
from quant2e.graph.edit import NO_GRAD

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_regions(gm: GraphModule) -> int:
    """Inline grad-mode and disabled-autocast regions of ``gm`` in place, nested ones and those in control flow too.

    Inner nodes keep their metadata, and their names where these are free. Bodies that stay are inlined inside.
    Returns how many regions were inlined.
    Raises `PassError` for a region whose result is used in a way that cannot be inlined.
    """
    return _inline(gm, autocast=False)


def _body(node: Node, *, autocast: bool) -> tuple[Node, tuple[Argument, ...]] | None:
    """The body of an inlinable region (a ``get_attr`` node) and its operands."""
    if node.target is _GRAD:
        body, operands = node.args[1], node.args[2:]
    elif node.target is _AUTOCAST and node.args[2] is False and not autocast:
        body, operands = node.args[4], node.args[5:]
    else:
        return None
    assert isinstance(body, Node)
    return body, operands


def _inline(gm: GraphModule, *, autocast: bool) -> int:
    count = 0
    regions: dict[Node, tuple[Node, tuple[Argument, ...]]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
            continue
        if (region := _body(node, autocast=autocast)) is not None:
            regions[node] = region
        enabled = autocast or (node.target is _AUTOCAST and node.args[2] is True)
        for body in bodies_of(node).values():
            count += _inline(body, autocast=enabled)
    if regions:
        _rebuild(gm, regions)
    return count + len(regions)


def _rebuild(gm: GraphModule, regions: dict[Node, tuple[Node, tuple[Argument, ...]]]) -> None:
    """Copy the graph, with the bodies of ``regions`` in place of their calls."""
    graph = Graph(tracer_cls=gm.graph._tracer_cls)
    new: dict[Node, Node] = {}
    results: dict[Node, list[Node]] = {}
    bodies = {body for body, _ in regions.values() if all(user in regions for user in body.users)}
    for node in gm.graph.nodes:
        if node in bodies:
            continue
        if node in regions:
            body, operands = regions[node]
            module, last = getattr(gm, str(body.target)), next(iter(reversed(graph.nodes)), None)
            results[node] = _copy_body(gm, module, [map_arg(x, new.__getitem__) for x in operands], graph)
            if node.target is _GRAD:
                _mark(graph, last, not node.args[0])
        elif node.target is operator.getitem and node.args[0] in results:
            new[node] = results[node.args[0]][node.args[1]]
        elif any(operand in results for operand in node.all_input_nodes):
            raise PassError(f"{where(node)} uses the whole result of a grad-mode region: return its tensors one by one")
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
    graph._codegen = gm.graph._codegen
    gm.graph = graph
    for target in {str(body.target) for body in bodies}:
        delattr(gm, target)


def _copy_body(gm: GraphModule, body: GraphModule, operands: list[Argument], graph: Graph) -> list[Node]:
    new: dict[Node, Argument] = {}
    pending = iter(operands)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            new[node] = next(pending)
        elif node.op == "output":
            return [map_arg(value, new.__getitem__) for value in node.args[0]]
        else:
            copied = graph.node_copy(node, new.__getitem__)
            if node.op == "get_attr":
                copied.target = _adopt(gm, body, str(node.target))
            new[node] = copied
    return []


def _mark(graph: Graph, before: Node | None, no_grad: bool) -> None:
    """Note on the last nodes of ``graph``, up to ``before``, that they came from a grad-mode region."""
    for node in itertools.takewhile(lambda node: node is not before, reversed(graph.nodes)):
        if node.op != "get_attr":
            node.meta.setdefault(NO_GRAD, no_grad)  # an inner region has had its say


def _adopt(gm: GraphModule, body: GraphModule, path: str) -> str:
    """Give ``gm`` the attribute that an inlined body reads, under a free name."""
    name = free_path(gm, path.replace(".", "_"))
    setattr(gm, name, attribute(body, path))
    return name
