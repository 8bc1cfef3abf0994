"""Batch norm in quantization-aware training: what is trained is what will be deployed.

    batch_norm(mac(x, w, b))  =  mac(x, w·s, (b - m)·s + h)                in evaluation, s = g / sqrt(v + eps)
                              =  batch_norm(mac(x, w·s, 0) / s + b)        in training

In evaluation, and in training once statistics are frozen (`freeze_batch_norm`), the graph has the form that conversion
writes: weight and bias are computed from the norm's parameters and running statistics, and fake-quantized. While the
norm normalises by the statistics of the batch, a fake-quantizer still sees the weight that would be deployed (Jacob et
al., arXiv:1712.05877, section 3.2; Krishnamoorthi, arXiv:1806.08342, section 3.2.2, with one pass over the data).
`graph.captured.norm_forms` goes from the one to the other; `unfuse` makes the first final.

Where ``s`` is zero (residual branches are often initialised so, and training can bring ``g`` there) the division would
have no result: in training ``s`` is ``1 / sqrt(v + eps)`` there, and the norm multiplies by zero afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.errors import Quant2eError
from quant2e.graph.attributes import free_path, replace_tensor
from quant2e.graph.captured.norm_forms import record_forms, set_form
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.dataflow import operand, set_operand
from quant2e.graph.edit import emit, emit_read, fold_into, insert_call, stands_for
from quant2e.graph.effects import aten
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.snapshot import snapshot
from quant2e.passes.fold_batch_norm import (
    GENERAL,
    LINEAR,
    TRANSPOSED,
    channel_axis,
    label_of,
    producer,
)

FUSED = "quant2e_fused_batch_norms"
"""Key in ``gm.meta`` of a prepared graph: the `FusedNorm` records of its rewritten batch norms."""


@dataclass(frozen=True, slots=True)
class TrainableNorm:
    """A batch norm with running statistics right behind an op with a constant weight, which nothing else reads.

    ``result``: the node with the normalised result in the layout of the op: the norm, or the exchange of axes behind it
    where another one stands in front of it (`norms_behind_products`).
    """

    mac: Node
    norm: Node
    result: Node


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedNorm:
    """One rewritten pair, by node names.

    ``scaled``, ``shifted``: weight and bias with the norm folded in. ``old_weight``, ``old_bias``: the operands before.
    ``zero``: the bias in training, if there was one. ``factor``: the node that reads ``scale``, or ``safe``, which has
    no zeros, in training; all None for a norm without scale. ``tail``: what stands behind ``mac`` in training, in
    order, the first two undo the scaling. ``written``: all new nodes that read the old operands.
    """

    mac: str
    norm: str
    scaled: str
    shifted: str
    old_weight: str
    old_bias: str | None
    zero: str | None
    factor: tuple[str, str, str] | None
    tail: tuple[str, ...]
    written: frozenset[str]


def trainable_norms(gm: GraphModule) -> Iterator[TrainableNorm]:
    """Every norm that can train as it will be deployed, in training and in evaluation mode."""
    norms = [node for node in gm.graph.nodes if node.target is aten.batch_norm.default]
    constants = Constants(gm.graph) if norms else ()
    for norm in norms:
        if (mac := _product_before(norm, constants)) is None:
            continue
        if operand(norm, "input") is mac:
            yield TrainableNorm(mac, norm, norm)
        elif (result := _exchanged_back(norm, mac)) is not None:
            yield TrainableNorm(mac, norm, result)


def _product_before(norm: Node, constants: Any) -> Node | None:
    """The op with a constant weight whose channels a norm with running statistics normalises."""
    statistics = [operand(norm, name) for name in ("running_mean", "running_var")]
    affine = [operand(norm, name) for name in ("weight", "bias")]
    if not all(map(_is_attribute, statistics)) or not all(node is None or _is_attribute(node) for node in affine):
        return None
    mac = producer(norm)
    if mac is None:
        return None
    weight, bias = operand(mac, "weight"), operand(mac, "bias")
    return mac if weight in constants and (bias is None or bias in constants) else None


def _is_attribute(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def _exchanged_back(norm: Node, mac: Node) -> Node | None:
    """The node behind a norm that undoes the exchange of axes in front of it."""
    before, users = operand(norm, "input"), list(norm.users)
    if before.target is not aten.transpose.int or operand(before, "self") is not mac or len(users) != 1:
        return None
    rank = mac.meta["val"].dim()
    axes = [
        {operand(node, name) % rank for name in ("dim0", "dim1")}
        for node in (before, *users)
        if node.target is aten.transpose.int
    ]
    return users[0] if axes == [{1, channel_axis(mac)}] * 2 else None


def norms_behind_products(gm: GraphModule) -> int:
    """A pass, for training: norm(moves(mac(x)))  =  moves(swap(norm(swap(mac(x))))), where moves only move axes.

    ``swap`` exchanges the axis of the channels with axis 1, where the norm wants them. Returns how many norms moved.
    """
    norms = [node for node in gm.graph.nodes if node.target is aten.batch_norm.default]
    constants = Constants(gm.graph) if norms else ()
    count = 0
    for norm in norms:
        mac = _product_before(norm, constants)
        if mac is None or operand(norm, "input") is mac or _exchanged_back(norm, mac) is not None:
            continue
        last = operand(norm, "input")
        (first,) = mac.users
        _parameters_before(gm, norm, first)
        norm.replace_all_uses_with(last)
        axis, source = channel_axis(mac), mac
        first.prepend(norm)
        if axis != 1:
            source = emit(norm, aten.transpose.int, mac, 1, axis)
        set_operand(norm, "input", source)
        norm.meta["val"] = source.meta["val"]
        result = norm
        if axis != 1:
            result = insert_call(first, aten.transpose.int, (norm, 1, axis), value=mac.meta["val"], origin=norm)
        first.replace_input_with(mac, result)
        count += 1
    return count


def fuse(gm: GraphModule, pairs: Sequence[TrainableNorm]) -> tuple[FusedNorm, ...]:
    """Write the form for evaluation of ``pairs`` into ``gm``, in place, and beside it what training needs.

    What reads a norm's result reads its op's instead; a pair that is called twice is folded once. `begin` follows, when
    the graph is complete. Linear in their number.
    """
    made: dict[tuple[Any, ...], _Folded] = {}
    with torch.no_grad():
        return tuple(_fuse(gm, pair, made) for pair in pairs)


@dataclass(frozen=True, slots=True)
class _Folded:
    """Nodes that a pair needs, and that pairs of the same parameters share."""

    scaled: Node
    shifted: Node
    safe: Node
    factor: tuple[Node, Node, Node] | None
    nodes: tuple[Node, ...]


def _fuse(gm: GraphModule, pair: TrainableNorm, made: dict[tuple[Any, ...], _Folded]) -> FusedNorm:
    mac, norm, result = pair.mac, pair.norm, pair.result
    weight, bias = operand(mac, "weight"), operand(mac, "bias")
    parameters = _parameters_before(gm, norm, mac)
    key = (weight, bias, *parameters.values(), operand(norm, "eps"), _layout(mac))
    if key not in made:
        before = mac.prev
        mean, variance = (emit(mac, snapshot, parameters[name]) for name in ("running_mean", "running_var"))
        scale, safe = _scales(mac, norm, variance)
        scaled, factor = _scaled_weight(mac, weight, safe)
        shifted = _shifted_bias(mac, norm, bias, mean, variance)
        factors = None if scale is safe else (factor, safe, scale)
        made[key] = _Folded(scaled, shifted, safe, factors, tuple(_between(before, mac)))
    folded = made[key]
    zero = None if bias is None else emit(mac, aten.zeros_like.default, bias)
    result.replace_all_uses_with(mac)
    tail = _tail(pair, folded.safe, bias)
    set_operand(mac, "weight", folded.scaled)
    set_operand(mac, "bias", folded.shifted)
    written = (*folded.nodes, *tail, *(() if zero is None else (zero,)))
    return FusedNorm(
        mac=mac.name,
        norm=norm.name,
        scaled=folded.scaled.name,
        shifted=folded.shifted.name,
        old_weight=weight.name,
        old_bias=None if bias is None else bias.name,
        zero=None if zero is None else zero.name,
        factor=None if folded.factor is None else tuple(node.name for node in folded.factor),  # type: ignore[arg-type]
        tail=tuple(node.name for node in tail),
        written=frozenset(node.name for node in written),
    )


_PARAMETERS = ("weight", "bias", "running_mean", "running_var")


def _parameters_before(gm: GraphModule, norm: Node, place: Node) -> dict[str, Node | None]:
    """Let a norm read its parameters in front of ``place``; the reads, by operand."""
    found = {name: _before(gm, operand(norm, name), place) for name in _PARAMETERS}
    for name, node in found.items():
        set_operand(norm, name, node)
    return found


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _tail(pair: TrainableNorm, scale: Node, bias: Node | None) -> list[Node]:
    """The nodes from the op to the result in training, right behind the op; until then they read no large tensor."""
    mac, norm, value = pair.mac, pair.norm, pair.mac.meta.get("val")
    along = [1] * (value.dim() if isinstance(value, Tensor) else 2)
    along[channel_axis(mac)] = -1
    behind = mac.next
    shaped = insert_call(behind, aten.reshape.default, (scale, along), origin=mac)
    last = insert_call(behind, aten.div.Tensor, (shaped, shaped), value=value, origin=mac)
    tail = [shaped, last]
    if bias is not None:
        shift = insert_call(behind, aten.reshape.default, (bias, along), origin=mac)
        last = insert_call(behind, aten.add.Tensor, (last, shift), value=value, origin=mac)
        tail += [shift, last]
    (operand(norm, "input") if pair.result is not norm else norm).replace_input_with(mac, last)
    return [*tail, norm] if pair.result is norm else [*tail, operand(norm, "input"), norm, pair.result]


def begin(gm: GraphModule, fused: Sequence[FusedNorm]) -> None:
    """Give the norms of ``fused`` the form of their mode, in place, once observers are in the graph."""
    nodes = {node.name: node for node in gm.graph.nodes}
    for record in fused:
        mac, norm = nodes[record.mac], nodes[record.norm]
        _put_behind(nodes[record.tail[-1]], mac, set(record.tail))
        unscaled, shaped = nodes[record.tail[1]], nodes[record.tail[0]]
        zero = None if record.zero is None else nodes[record.zero]
        operands = [(mac, "bias", zero, operand(mac, "bias")), (unscaled, "self", mac, shaped)]
        if record.factor is not None:
            factor, safe, scale = (nodes[name] for name in record.factor)
            operands.append((factor, "self", safe, scale))
        record_forms(norm, mac, nodes[record.tail[-1]], operands)
        set_form(norm, bool(operand(norm, "training")), nodes)
    gm.recompile()


def _put_behind(result: Node, mac: Node, tail: set[str]) -> None:
    """Let what came to read the op's result, observers above all, stand behind what gives the result in training."""
    early: dict[Node, None] = {}
    for node in _between(mac, result):
        if node.name not in tail and any(source is mac or source in early for source in node.all_input_nodes):
            early[node] = None
    for node in reversed(early):
        result.append(node)


def _scales(mac: Node, norm: Node, variance: Node) -> tuple[Node, Node]:
    """``s``, in front of ``mac``, and the same without zeros."""
    gain = operand(norm, "weight")
    deviation = emit(mac, aten.sqrt.default, emit(mac, aten.add.Tensor, variance, operand(norm, "eps")))
    inverse = emit(mac, aten.reciprocal.default, deviation)
    if gain is None:
        return inverse, inverse
    scale = emit(mac, aten.div.Tensor, gain, deviation)
    return scale, emit(mac, aten.where.self, emit(mac, aten.eq.Scalar, scale, 0), inverse, scale)


def _scaled_weight(mac: Node, weight: Node, scale: Node) -> tuple[Node, Node]:
    """Nodes of ``w·s``, in front of ``mac``, and of what reads ``s`` for it."""
    shape, view = _weight_shape(mac)
    factor = emit(mac, aten.reshape.default, scale, shape)
    if view is None:
        return emit(mac, aten.mul.Tensor, weight, factor), factor
    grouped = emit(mac, aten.mul.Tensor, emit(mac, aten.reshape.default, weight, view), factor)
    return emit(mac, aten.reshape.default, grouped, list(_sizes(mac))), factor


def _shifted_bias(mac: Node, norm: Node, bias: Node | None, mean: Node, variance: Node) -> Node:
    """``(b - m)·s + h`` in front of ``mac``, in the order of ``torch.nn.utils.fusion``."""
    gain, shift = operand(norm, "weight"), operand(norm, "bias")
    moved = emit(mac, aten.neg.default, mean) if bias is None else emit(mac, aten.sub.Tensor, bias, mean)
    inverse = emit(mac, aten.rsqrt.default, emit(mac, aten.add.Tensor, variance, operand(norm, "eps")))
    moved = emit(mac, aten.mul.Tensor, moved, inverse)
    if gain is not None:
        moved = emit(mac, aten.mul.Tensor, moved, gain)
    if shift is not None:
        moved = emit(mac, aten.add.Tensor, moved, shift)
    result, wanted = node_tensor(moved), node_tensor(operand(mac, "weight") if bias is None else bias)
    if result is not None and wanted is not None and result.dtype != wanted.dtype:
        moved = emit(mac, aten.to.dtype, moved, wanted.dtype)
    return moved


def _layout(mac: Node) -> tuple[bool, int]:
    """Is the op transposed, and with how many groups?"""
    transposed = mac.target in TRANSPOSED or (mac.target in GENERAL and bool(operand(mac, "transposed")))
    return transposed, 1 if mac.target in LINEAR else int(operand(mac, "groups"))


def _sizes(mac: Node) -> tuple[int, ...]:
    value = operand(mac, "weight").meta.get("val")
    assert isinstance(value, Tensor), "the weight's shape is recorded: its producer was looked at"
    return tuple(value.shape)


def _weight_shape(mac: Node) -> tuple[list[int], list[int] | None]:
    """The shape in which ``s`` meets the weight, and the view of the weight that it meets (None: the weight as it is).

    A transposed weight is ``[in, out / groups, *kernel]``, group by group along axis 0.
    """
    sizes = _sizes(mac)
    transposed, groups = _layout(mac)
    kernel = [1] * (len(sizes) - 2)
    if not transposed:
        return [-1, 1, *kernel], None
    if groups == 1:
        return [1, -1, *kernel], None
    return [groups, 1, sizes[1], *kernel], [groups, sizes[0] // groups, *sizes[1:]]


def _before(gm: GraphModule, node: Node | None, place: Node) -> Node | None:
    """A node that reads what ``node`` reads and stands in front of ``place``."""
    if node is None or node < place:
        return node
    read = emit_read(gm, place, str(node.target))
    stands_for(read, node)
    return read


# ---------------------------------------------------------------- conversion


def unfuse(gm: GraphModule, fused: Sequence[FusedNorm]) -> None:
    """Make the form for evaluation, in which the graph is, the only one: folded weights and biases become constants.

    They are computed by the nodes of the graph, so they are the very numbers of ``prepared.eval()``. Observers stay in
    place; what nothing reads any more is left to dead code elimination.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    folded: dict[str, Node] = {}
    with torch.inference_mode(False), torch.no_grad():
        for record in fused:
            needed = (record.mac, record.scaled, record.shifted, *record.tail)
            if (gone := next((name for name in needed if name not in nodes), None)) is not None:
                raise Quant2eError(
                    f"the prepared graph was edited: '{gone}', with which '{record.mac}' trains its batch norm "
                    f"'{record.norm}', is gone. Convert the graph as prepare_qat_pt2e made it, trained or not."
                )
            for role, name in (("weight", record.scaled), ("bias", record.shifted)):
                if name not in folded:
                    alike = [r for r in fused if name in (r.scaled, r.shifted)]
                    folded[name] = _make_constant(gm, record, role, nodes, alike)
        for record in fused:
            for name in reversed(record.tail):
                gm.graph.erase_node(nodes[name])
            mac = nodes[record.mac]
            fold_into(mac, record.norm)


def _make_constant(
    gm: GraphModule, record: FusedNorm, role: str, nodes: Mapping[str, Node], alike: Sequence[FusedNorm]
) -> Node:
    """A parameter in place of a computed weight or bias; under the path of the old one, where nothing else reads it."""
    computed = nodes[record.scaled if role == "weight" else record.shifted]
    weight, mac = nodes[record.old_weight], nodes[record.mac]
    old = weight if role == "weight" else None if record.old_bias is None else nodes[record.old_bias]
    tensor = evaluate(gm, computed).detach()
    path = None
    if old is not None and old.op == "get_attr":
        readers = {nodes[name] for other in alike for name in other.written}
        alone = list(gm.graph.find_nodes(op="get_attr", target=old.target)) == [old]
        path = str(old.target)
        if not alone or not readers.issuperset(old.users):
            path = free_path(gm, f"{path}_{label_of(nodes[record.norm])}")
    elif weight.op == "get_attr":
        path = free_path(gm, (str(weight.target).rpartition(".")[0] + f".{role}").removeprefix("."))
    if path is None:
        path = free_path(gm, f"{mac.name}_{role}")
    replace_tensor(gm, path, torch.nn.Parameter(tensor, requires_grad=False))
    read = emit_read(gm, computed, path, origin=mac)
    computed.replace_all_uses_with(read)
    return read
