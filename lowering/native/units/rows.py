"""Rows: ops on rows compute where rows lie as ``[n, rows, channels]``; what moves them comes behind.

x ─ transpose ─ q ─ dq ─ linear ─▶        =>        x ─ q ─ dq ─ linear ─ transpose ─▶

An op that computes each row by itself gives the same whichever order they are in. What moves them back later is met by
what moved them, and nothing is left of both: a region reads tensors as they lie, and moves none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.native.units.layouts import follow, moved_from, places_of
from lowering.native.units.unit import ACTIVATIONS, is_identity
from lowering.native.units.values import image_shape, lie_alike
from quant2e.graph.edit import emit_behind
from quant2e.graph.fake_values import value_of_call
from quant2e.graph.qdq_ops import qd
from quant2e.passes.dead_code import remove_dead_code

aten = torch.ops.aten

_ON_ROWS = {
    qd.quantize_per_tensor.default,
    qd.dequantize_per_tensor.default,
    aten.linear.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    *ACTIVATIONS,
}
_ON_TWO = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor}
_HEADS = {aten.scaled_dot_product_attention.default, aten.matmul.default}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where the rows of a tensor are: in ``base``, ``[n, rows, channels]``, ``turned`` where rows come first.

    ``joined``: ``base`` is yet to be made of the heads ``[n, heads, rows, size]`` that it names.
    """

    base: Node
    turned: bool
    joined: bool = False


def straighten_rows(gm: GraphModule) -> None:
    """Let ops on rows read tensors ``[n, rows, channels]`` wherever what they read was made of one by moving rows."""
    changed = False
    for node in list(gm.graph.nodes):
        read = _read(node)
        found = [_rows(operand) for operand in read]
        rows = [place for place in found if place is not None]
        if not read or len(rows) != len(read) or all(r.base is operand for r, operand in zip(rows, read, strict=True)):
            continue
        if len({place.turned for place in rows}) == 1 and _varying(node) <= 1:
            changed |= _move(node, read, rows)
    if changed:
        remove_dead_code(gm)


def _read(node: Node) -> list[Node]:
    """The tensors whose rows an op computes with; none for ops that do not work row by row."""
    given = node.args[:2] if node.target in _ON_TWO else node.args[:1] if node.target in _ON_ROWS else ()
    read = [operand for operand in given if isinstance(operand, Node)]
    whole = len(read) == len(given) and all(isinstance(operand.meta.get("val"), Tensor) for operand in read)
    return read if whole and isinstance(node.meta.get("val"), Tensor) else []


def _varying(node: Node) -> int:
    return sum(not isinstance(size, int) for size in node.meta["val"].shape)


def _rows(node: Node) -> _Rows | None:
    source, passed = moved_from(node)
    if all(is_identity(op) for op in passed):
        return _Rows(node, turned=False)
    for end, start in reversed(list(enumerate((*passed, source)))):
        shape = image_shape(start)
        if shape is None or len(shape) != (4 if start.target in _HEADS else 3):
            continue
        places = places_of(shape)
        moved = follow(places, passed[:end])
        if moved is None:
            continue
        joined = start.target in _HEADS
        turned = _turned(moved, places.transpose(1, 2).flatten(2) if joined else places)
        if turned is not None:
            return _Rows(start, turned, joined)
    return None


def _turned(moved: Tensor, base: Tensor) -> bool | None:
    """Whether ``moved`` has the rows of ``base`` with its first two axes exchanged, or as they are; else None."""
    width = base.shape[-1]
    if moved.numel() != base.numel() or moved.dim() < 2 or moved.shape[-1] != width:
        return None
    rows = moved.reshape(-1, width)
    if torch.equal(rows, base.reshape(-1, width)):
        return False
    return True if torch.equal(rows, base.transpose(0, 1).reshape(-1, width)) else None


def _move(node: Node, read: list[Node], rows: list[_Rows]) -> bool:
    """Let ``node`` read the bases, and move its result to where it was."""
    bases = [_joined(place) if place.joined else place.base for place in rows]
    shapes = {tuple(map(str, base.meta["val"].shape[:2])) for base in bases}
    before = node.meta["val"]
    if len(shapes) != 1:
        return False
    if len(bases) == 2 and bases[0].meta["val"].shape[2:] != bases[1].meta["val"].shape[2:]:
        return False
    node.args = (*bases, *node.args[len(read) :])
    node.meta["val"] = value_of_call(node)
    users = list(node.users)
    last = node
    if rows[0].turned:
        last = emit_behind(last, node, aten.transpose.int, 0, 1)
    if last.meta["val"].shape != before.shape:
        last = emit_behind(last, node, aten.reshape.default, [s if isinstance(s, int) else -1 for s in before.shape])
    if not lie_alike(last.meta["val"], before):  # who reads it may view it
        last = emit_behind(last, node, aten.contiguous.default)
    if last is not node:
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user in users)
    return True


def _joined(place: _Rows) -> Node:
    """Heads side by side, ``[n, rows, heads * size]``."""
    heads = place.base
    sizes = heads.meta["val"].shape
    turned = emit_behind(heads, heads, aten.transpose.int, 1, 2)
    return emit_behind(turned, heads, aten.reshape.default, [-1, sizes[2], sizes[1] * sizes[3]])
