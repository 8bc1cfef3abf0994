"""Attention scores in three dimensions.

softmax(view(bmm) · scale + mask) viewed for the next bmm  =  softmax(bmm · scale + view(mask))

where rows and columns of the scores vary: XNNPACK's views have at most one size that varies, so a view of scores to
four dimensions and back would split every layer of attention into delegates. The mask is viewed once, for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit
from quant2e.graph.fake_values import shape_of

_ATEN = torch.ops.aten
_RESHAPES = movements(Effect.RESHAPE)
_POINTWISE = frozenset({_ATEN.mul.Tensor, _ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.div.Tensor})

Masks = dict[tuple[Node | int, ...], Node]
"""Masks in three dimensions, by mask and what its leading sizes become."""


def scores_in_three_dimensions(module: GraphModule) -> int:
    """Rewrite what lies between two batched products; returns how many places changed."""
    count = 0
    masks: Masks = {}
    for node in list(module.graph.nodes):
        if not _splits_batch(node) or _varying(node) < 2:
            continue
        chain = list(_until_viewed_back(node))
        if chain and chain[-1].target in _RESHAPES:
            _flatten(node, chain, masks)
            count += 1
    return count


def _splits_batch(node: Node) -> bool:
    """Whether a node views the result of a batched product in other leading sizes, rows and columns as they are."""
    source = operand(node, 0) if node.target in _RESHAPES else None
    is_product = isinstance(source, Node) and source.target is _ATEN.bmm.default
    return is_product and _written(node)[-2:] == _written(source)[-2:]


def _varying(node: Node) -> int:
    return sum(not isinstance(size, int) for size in shape_of(node))


def _until_viewed_back(view: Node) -> Iterator[Node]:
    """The ops behind ``view``, the one that views back last; nothing behind an op that needs all dimensions."""
    value, lead = view, shape_of(view)[:-2]
    while len(users := [user for user in value.users if not _is_size(user)]) == 1:
        (user,) = users
        if user.target in _RESHAPES:
            if operand(user, 0) is value and _written(user) == _written(view.args[0]):
                yield user
            return
        if not (_is_softmax(user) or _is_idle_dropout(user) or _takes_flat(user, value, lead)):
            return
        yield user
        value = user


def _is_size(node: Node) -> bool:
    """Whether a node asks for the number of rows or columns."""
    source, dim = operand(node, 0), operand(node, 1)
    return node.target is _ATEN.sym_size.int and isinstance(source, Node) and dim in _last_two(source)


def _last_two(node: Node) -> tuple[int, int]:
    rank = len(shape_of(node))
    return rank - 2, rank - 1


def _written(node: object) -> list[str]:
    """Sizes as text, so that comparing them assumes nothing."""
    assert isinstance(node, Node)
    return [str(size) for size in shape_of(node)]


def _is_softmax(node: Node) -> bool:
    return node.target is _ATEN.softmax.int and node.args[1] in (-1, len(shape_of(node)) - 1)


def _is_idle_dropout(node: Node) -> bool:
    return node.target is _ATEN.dropout.default and operand(node, "train") is False


def _takes_flat(node: Node, value: Node, lead: tuple[int | torch.SymInt, ...]) -> bool:
    """Whether a pointwise op works on three dimensions, its other operand viewed accordingly."""
    if node.target not in _POINTWISE or len(shape_of(node)) != len(shape_of(value)):
        return False
    others = [arg for arg in node.args if isinstance(arg, Node) and arg is not value]
    return all(
        len(shape_of(other)) <= 2 or _all_ones(other) or (_known(lead) and _expands(other, lead)) for other in others
    )


def _all_ones(mask: Node) -> bool:
    return all(isinstance(size, int) and size == 1 for size in shape_of(mask)[:-2])


def _known(sizes: tuple[int | torch.SymInt, ...]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _expands(mask: Node, lead: tuple[int | torch.SymInt, ...]) -> bool:
    own = shape_of(mask)[:-2]
    return len(own) == len(lead) and all(
        isinstance(s, int) and s in (1, full) for s, full in zip(own, lead, strict=True)
    )


def _flatten(view: Node, chain: list[Node], masks: Masks) -> None:
    """Compute ``chain`` on what ``view`` views."""
    flat, value = view.args[0], view
    assert isinstance(flat, Node)
    for node in chain:
        for user in filter(_is_size, list(value.users)):
            user.args = (flat, _last_two(flat)[_last_two(value).index(user.args[1])])
        if node is chain[-1]:
            break
        args = [flat if arg is value else _flat_mask(arg, view, masks) for arg in node.args]
        if _is_softmax(node):
            args[1] = -1
        if not _is_idle_dropout(node):
            target: Any = node.target
            flat = emit(node, target, *args, **node.kwargs)
        value = node
    chain[-1].replace_all_uses_with(flat)
    for node in (*reversed(chain), view):
        node.graph.erase_node(node)


def _flat_mask(mask: Any, view: Node, masks: Masks) -> Any:
    if not isinstance(mask, Node) or len(shape_of(mask)) <= 2:
        return mask
    lead = [1] if _all_ones(mask) else [int(size) for size in shape_of(view)[:-2]]
    if (mask, *lead) not in masks:
        like = mask.next  # whatever reads the mask comes later
        while like.op in ("placeholder", "get_attr"):
            like = like.next
        source = mask if _all_ones(mask) else emit(like, _ATEN.expand.default, mask, [*lead, -1, -1])
        sizes: list[int | Node] = [math.prod(lead)]
        for dim in _last_two(mask):
            size = shape_of(mask)[dim]
            sizes.append(size if isinstance(size, int) else emit(like, _ATEN.sym_size.int, mask, dim))
        masks[mask, *lead] = emit(like, _ATEN.reshape.default, source, sizes)
    return masks[mask, *lead]
