"""Einsum → linear.

einsum("…i,oi->…o", x, w)  =  linear(x, w)      for any letters that say so, where ``w`` is constant.

Axes of ``x`` that are summed over with axes of ``w`` come last and become one, as do the axes that only ``w`` has; what
comes out is given its axes back. The node keeps its name and its metadata; moves of axes stand in front and behind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from quant2e.annotation.pattern import Match, Op
from quant2e.graph.constants import Constants
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_behind
from quant2e.graph.fake_values import node_tensor, value_of_call
from quant2e.passes.rewrite import Rewrite
from quantizers.rewrites.matmul_to_linear import ORIGINAL_TARGET

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class RowsByMatrix:
    """An einsum of rows and a constant. Labels are letters, and numbers for the axes that "..." stands for.

    ``rows``: axes of ``x`` that stay, in the order of the result; ``summed``: axes of both, in the order of ``x``;
    ``columns``: axes of ``w`` alone, in its order.
    """

    x: Node
    weight: Node
    x_labels: tuple[str, ...]
    weight_labels: tuple[str, ...]
    out_labels: tuple[str, ...]
    rows: tuple[str, ...]
    summed: tuple[str, ...]
    columns: tuple[str, ...]


def einsums_as_linear(graph: Graph, wanted: Callable[[Node], bool]) -> Rewrite:
    """The einsums of ``graph`` that ``wanted`` answers True for, of rows and a constant, as linear."""
    constants = Constants(graph)

    def is_wanted(match: Match) -> bool | str:
        if not wanted(match.root):
            return "it is not wanted"
        product = _product(match.root, constants)
        return product if isinstance(product, str) else True

    def build(_: GraphModule, match: Match) -> Node:
        product = _product(match.root, constants)
        assert isinstance(product, RowsByMatrix)
        return _linear(match.root, product)

    return Rewrite("einsums_as_linear", Op(frozenset({aten.einsum.default}), ()), build, is_wanted)


def _product(node: Node, constants: Constants) -> RowsByMatrix | str:
    """The einsum as a product of rows and a constant, or why it is none."""
    tensors = operand(node, "tensors")
    if len(tensors) != 2:
        return f"'{node.name}' multiplies {len(tensors)} tensors"
    fixed = [tensor in constants for tensor in tensors]
    if fixed.count(True) != 1:
        return f"{'both operands' if all(fixed) else 'no operand'} of '{node.name}' is constant"
    ranks = [value.dim() for tensor in tensors if (value := node_tensor(tensor)) is not None]
    terms = None if len(ranks) != 2 else _labels(str(operand(node, "equation")), ranks)
    if terms is None:
        return f"the axes of '{node.name}' are not known"
    place = fixed.index(True)
    weight, x, out = terms[place], terms[1 - place], terms[2]
    if any(len(set(term)) != len(term) for term in terms):
        return f"'{node.name}' takes a diagonal"
    summed = tuple(label for label in x if label in weight and label not in out)
    rows = tuple(label for label in out if label in x)
    columns = tuple(label for label in weight if label not in x)
    if any(label in weight for label in rows):
        return f"'{node.name}' is a product for each entry of an axis that both operands have"
    if not summed or not rows or not columns or len(rows) + len(columns) != len(out):
        return f"'{node.name}' is no product of rows and a matrix"
    if len(rows) + len(summed) != len(x):
        return f"'{node.name}' sums over an axis of one operand"
    return RowsByMatrix(tensors[1 - place], tensors[place], x, weight, out, rows, summed, columns)


def _labels(equation: str, ranks: Sequence[int]) -> tuple[tuple[str, ...], ...] | None:
    """A label for each axis of the operands and of the result; None where letters and axes do not fit."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    if not arrow:
        counts = Counter(letter for term in terms for letter in term if letter != ".")
        right = "..." * ("." in left) + "".join(sorted(letter for letter, count in counts.items() if count == 1))
    broad = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True) if "..." in term]
    if len(broad) > 1:
        return None
    numbers = tuple(map(str, range(broad[0] if broad else 0)))
    found = []
    for term in (*terms, right):
        before, dots, after = term.partition("...")
        found.append((*before, *(numbers if dots else ()), *after))
    fits = all(len(labels) == rank for labels, rank in zip(found, ranks, strict=False))
    return tuple(found) if fits else None


def _linear(node: Node, product: RowsByMatrix) -> Node:
    x = _moved(node, product.x, product.x_labels, (*product.rows, *product.summed))
    if len(product.summed) > 1:
        x = emit(node, aten.flatten.using_ints, x, len(product.rows), -1)
    weight = _moved(node, product.weight, product.weight_labels, (*product.columns, *product.summed))
    value = node_tensor(weight)
    assert value is not None, "its rank was looked at"
    sizes = [int(size) for size in value.shape[: len(product.columns)]]
    if value.dim() != 2:
        weight = emit(node, aten.reshape.default, weight, [math.prod(sizes), -1])
    users = list(node.users)
    node.meta[ORIGINAL_TARGET] = node.target
    node.target, node.args, node.kwargs = aten.linear.default, (x, weight), {}
    node.meta["val"] = value_of_call(node)
    last = node
    if len(sizes) > 1:
        last = emit_behind(last, node, aten.unflatten.int, -1, sizes)
    made = (*product.rows, *product.columns)
    if made != product.out_labels:
        last = emit_behind(last, node, aten.permute.default, [made.index(label) for label in product.out_labels])
    for user in users:
        user.replace_input_with(node, last)
    return node


def _moved(place: Node, tensor: Node, labels: Sequence[str], wanted: Sequence[str]) -> Node:
    if tuple(labels) == tuple(wanted):
        return tensor
    return emit(place, aten.permute.default, tensor, [list(labels).index(label) for label in wanted])
