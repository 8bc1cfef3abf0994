"""Attention as a unit of a region: the fused op, or the products, the scale, the mask and the softmax it is made of.

q k v ─▶ heads ─▶ softmax(q k^T * scale + mask) v ─▶ rows        =>        one step on the rows of q, k and v
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from lowering.native.kernels.plan import RegionStep, StepKind
from lowering.native.units.layouts import Heads, heads_at, rows_made_of
from lowering.native.units.masks import mask_of
from lowering.native.units.unit import Emitter, Ending, Unit, describe_operand, ending_of, finish, is_identity
from lowering.native.units.values import Integers, integers_of, quantizes, same_size, stored
from quant2e.graph.dataflow import operand, operands

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_ADDS = frozenset({aten.add.Tensor, aten.add_.Tensor})
_TIMES = frozenset({aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar})
_OVER = frozenset({aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scores:
    """What the graph does between its two products. ``probabilities``: how they are rounded; ``last``: the second."""

    scale: float
    mask: Node | None
    probabilities: Integers | None
    nodes: tuple[Node, ...]
    values: Node
    last: Node


def attention_unit(gm: GraphModule, node: Node, taken: set[Node]) -> Unit | str | None:
    """The unit of an attention that begins with ``node``, its first product or the fused op; None for other ops."""
    del gm
    if node.target is aten.scaled_dot_product_attention.default:
        return _fused(node, taken)
    if node.target not in _PRODUCTS:
        return None
    scores = _scores_of(node)
    if scores is None:
        return "a product of two tensors that no softmax and second product follow"
    return _unit(node, node.args[0], node.args[1], scores, taken)


def _fused(node: Node, taken: set[Node]) -> Unit | str | None:
    given = operands(node)
    mask, scale = given["attn_mask"], given["scale"]
    if given["dropout_p"] or (scale is not None and not isinstance(scale, int | float)):
        return "an attention with dropout, or with a scale that is computed"
    scores = _Scores(
        scale=1 / math.sqrt(given["query"].meta["val"].shape[-1]) if scale is None else float(scale),
        mask=mask,
        probabilities=None,
        nodes=(),
        values=given["value"],
        last=node,
    )
    return _unit(node, given["query"], given["key"], scores, taken)


def _unit(node: Node, query: object, key: object, scores: _Scores, taken: set[Node]) -> Unit | str:
    fused, rows = node is scores.last, rows_made_of(scores.last)
    if rows is None:
        return "an attention whose heads are not put side by side again"
    q, k, v = _operand(query), _operand(key, transposed=not fused), _operand(scores.values)
    if q is None or k is None or v is None:
        return "an attention of heads that are not channels of rows"
    shares = q.heads.readers % k.heads.count == 0 if fused and operand(node, "enable_gqa") else False
    same = q.heads.readers == k.heads.readers == v.heads.readers
    if q.heads.readers != q.heads.count or k.heads.count != v.heads.count or not (same or shares):
        return "an attention whose heads do not belong together"
    if scores.scale * q.factor * k.factor <= 0 or v.factor != 1 or k.heads.size != q.heads.size:
        return "an attention with a scale that is not positive"
    if scores.mask is not None and not _fits(scores.mask, node, q, k):
        return "an attention with a mask of another shape than its scores"
    ending = ending_of(rows[-1], taken, adds=False, activates=False)
    step = _Attention(q, k, v, scores, fused and bool(operand(node, "is_causal")), ending)
    nodes = (*q.nodes, *k.nodes, *v.nodes, node, *scores.nodes, scores.last, *rows, *ending.nodes)
    return Unit(
        nodes=_alone(tuple(dict.fromkeys(nodes))),
        reads=tuple(dict.fromkeys(n for n in (q.read, k.read, v.read, scores.mask) if n is not None)),
        writes=ending.writes,
        emit=step.emit,
        masks=() if scores.mask is None else (scores.mask,),
        passed=tuple(dict.fromkeys(nodes)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operand:
    """``read``: floats, or the quantize op of integers, in whose rows the heads lie, to be multiplied by ``factor``."""

    heads: Heads
    read: Node
    factor: float
    nodes: tuple[Node, ...]


def _operand(value: object, *, transposed: bool = False) -> _Operand | None:
    if not isinstance(value, Node):
        return None
    first, factor, above = _unscaled(value)
    heads = heads_at(first, transposed=transposed)
    if heads is None:
        return None
    source, more, below = _unscaled(heads.source)
    read = stored(source)
    nodes = (*above, *heads.moved, *below, *((source,) if read is not None else ()))
    return _Operand(heads=heads, read=read or source, factor=factor * more, nodes=nodes)


def _unscaled(node: Node) -> tuple[Node, float, list[Node]]:
    """What ``node`` is a multiple of, the number it is multiplied by, and the ops that do."""
    factor, passed = 1.0, list[Node]()
    while (found := _factor(node)) is not None:
        passed.append(node)
        factor *= found
        source = node.args[0]
        assert isinstance(source, Node), "numbers multiply tensors"
        node = source
    return node, factor, passed


def _factor(node: Node) -> float | None:
    """The number that a node multiplies its operand by; None for other ops."""
    if node.target not in _TIMES | _OVER:
        return None
    one, other = node.args[0], operand(node, "other")
    if not isinstance(one, Node) or isinstance(other, Node) or not isinstance(other, int | float) or not other:
        return None
    return float(other) if node.target in _TIMES else 1 / float(other)


def _scores_of(node: Node) -> _Scores | None:
    """Follow a product of queries and keys through scale, mask and softmax to the second product."""
    scale, mask, softmax, rounded = 1.0, None, False, None
    nodes: list[Node] = []
    last = node
    while len(last.users) == 1:
        user = next(iter(last.users))
        factor = _factor(user)
        if user.target in _PRODUCTS and softmax and user.args[0] is last:
            values = user.args[1]
            if not isinstance(values, Node):
                return None
            return _Scores(scale=scale, mask=mask, probabilities=rounded, nodes=tuple(nodes), values=values, last=user)
        if is_identity(user):
            pass
        elif not softmax and mask is None and factor is not None:
            scale *= factor
        elif not softmax and mask is None and (added := _added(user, last)) is not None:
            mask = added
        elif not softmax and user.target in _SOFTMAX and _over_last(user):
            softmax = True
        elif softmax and rounded is None and quantizes(user) and len(user.users) == 1:
            reader = next(iter(user.users))
            if stored(reader) is not user:
                return None
            rounded = integers_of(user)
            nodes.append(user)
            user = reader
        else:
            return None
        nodes.append(user)
        last = user
    return None


def _added(node: Node, scores: Node) -> Node | None:
    if node.target not in _ADDS or operand(node, "alpha") != 1:
        return None
    one, two = operand(node, "self"), operand(node, "other")
    other = two if one is scores else one
    return other if isinstance(other, Node) and other is not scores else None


def _over_last(node: Node) -> bool:
    axes = node.meta["val"].dim()
    wide = operand(node, "dtype") in (None, torch.float32) and not operand(node, "half_to_float", False)
    return bool(operand(node, "dim") % axes == axes - 1 and wide)


def _fits(mask: Node, scores: Node, q: _Operand, k: _Operand) -> bool:
    """Whether a mask belongs to scores ``[n, heads, rows, keys]``: each of its sizes but the last may be 1."""
    sizes = mask_of(mask)
    if sizes is None or (mask.meta["val"].dtype is torch.bool and scores.target in _PRODUCTS):
        return False
    rows, keys = (part.heads.source.meta["val"].shape[1] for part in (q, k))
    whole = scores.meta["val"].dim() == 4 and sizes.heads in (1, q.heads.count) and sizes.rows in (1, rows)
    samples = same_size(sizes.samples, 1) or same_size(sizes.samples, q.heads.source.meta["val"].shape[0])
    return whole and samples and sizes.keys == keys


def _alone(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Those of ``nodes`` that only others of them read, and the last: what else reads one needs it outside as well."""
    kept = nodes
    while (
        less := tuple(node for node in kept if node is nodes[-1] or all(user in kept for user in node.users))
    ) != kept:
        kept = less
    return kept


@dataclass(frozen=True, slots=True)
class _Attention:
    q: _Operand
    k: _Operand
    v: _Operand
    scores: _Scores
    causal: bool
    ending: Ending

    def emit(self, emitter: Emitter) -> None:
        """Add the step."""
        q, k, v = self.q.heads, self.k.heads, self.v.heads
        step = RegionStep(
            kind=StepKind.ATTENTION,
            groups=q.count,
            inputs=k.count,
            outputs=q.size,
            inner=v.size,
            mode=int(self.causal),
            extra_number=self.scores.scale * self.q.factor * self.k.factor,
            x_first=q.first,
            other_first=k.first,
            third_first=v.first,
        )
        if quantizes(self.q.read):
            emitter.border(self.q.read)  # groups of four bytes are read, of the last row as well
        for place, part in (("x", self.q), ("other", self.k), ("third", self.v)):
            describe_operand(step, emitter, place, part.read)
        if self.scores.mask is not None:
            step.fourth = emitter.read(self.scores.mask)
        rounded = self.scores.probabilities
        if rounded is not None:
            step.softmax_scale, step.softmax_zero = rounded.scale, rounded.zero
            step.softmax_low, step.softmax_high = rounded.low, rounded.high
        finish(emitter, step, ending=self.ending)
