"""Matmul → linear.

addmm(b, x, w)  =  linear(x, wᵀ, b)      and      x @ w  =  linear(x, wᵀ)      where ``w`` is constant.

Backends know one product with a constant weight, linear. Some models (GPT-2's Conv1D) spell it otherwise. The node
keeps its name and its metadata; only what it calls changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Node

from quant2e.annotation.pattern import Arg, Match, Op, constant
from quant2e.graph.constants import Constants
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit
from quant2e.graph.fake_values import node_tensor
from quant2e.passes.rewrite import Rewrite

aten = torch.ops.aten

ORIGINAL_TARGET = "original_target"
"""Key in ``node.meta`` of what a rewritten node called before, so that settings for that op still find it."""


def products_as_linear(graph: Graph, wanted: Callable[[Node], bool]) -> Rewrite:
    """The products of ``graph`` that ``wanted`` answers True for, of a matrix or a stack of rows, as linear."""
    constants = Constants(graph)

    def is_wanted(match: Match) -> bool | str:
        if not wanted(match.root):
            return "it is not wanted"
        x = match.edges["x"][0]
        return x not in constants or f"'{x.name}' is constant as well"

    return Rewrite("products_as_linear", _PRODUCT, _linear, is_wanted)


def _plain_sum(node: Node) -> bool | str:
    if operand(node, "alpha") not in (None, 1) or operand(node, "beta") not in (None, 1):
        return f"'{node.name}' has factors"
    if _rank(operand(node, 0)) != 1:
        return f"the bias of '{node.name}' is no vector"
    return _matrices(node, 1, 2)


def _rows_and_matrix(node: Node) -> bool | str:
    return _matrices(node, 0, 1)


def _matrices(node: Node, x: int, weight: int) -> bool | str:
    fits = (_rank(operand(node, x)) or 0) >= 1 and _rank(operand(node, weight)) == 2
    return fits or f"'{node.name}' is no product of rows and a matrix"


_X, _W = Arg("x"), constant("w")
_PRODUCT = Op(frozenset({aten.addmm.default}), (constant("b"), _X, _W), when=_plain_sum) | Op(
    frozenset({aten.mm.default, aten.matmul.default}), (_X, _W), when=_rows_and_matrix
)


def _linear(_: GraphModule, match: Match) -> Node:
    node = match.root
    transposed = emit(node, aten.t.default, match.edges["w"][0])
    bias = (match.edges["b"][0],) if "b" in match.edges else ()
    node.meta[ORIGINAL_TARGET] = node.target
    node.target, node.args, node.kwargs = aten.linear.default, (match.edges["x"][0], transposed, *bias), {}
    return node


def _rank(node: object) -> int | None:
    tensor = node_tensor(node)
    return None if tensor is None else tensor.dim()
