"""Batch norm in quantization-aware training: what is fake-quantized is the weight that will be deployed.

    batch_norm(mac(x, w, b))  =  batch_norm(mac(x, w·s, 0) / s + b),      s = g / sqrt(v + eps)

so that a fake-quantizer of ``w·s`` sees the weight with the norm folded in, by its running statistics, while the norm
itself still normalises by those of the batch (Jacob et al., arXiv:1712.05877, section 3.2; Krishnamoorthi,
arXiv:1806.08342, section 3.2.2, with one pass over the data). `unfuse` is the way back, at conversion:
``mac(x, w·s, (b - m)·s + h)``.

Where ``g`` has zeros (residual branches are often initialised so) the division would have no result; there ``s`` is
computed with ones in their place, and the norm multiplies by zero afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.errors import Quant2eError
from quant2e.graph.attributes import attribute, free_path, replace_tensor
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.dataflow import operand, set_operand
from quant2e.graph.edit import emit, emit_read, insert_call, set_origin, stands_for
from quant2e.graph.effects import aten
from quant2e.passes.fold_batch_norm import (
    FOLDED,
    GENERAL,
    LINEAR,
    TRANSPOSED,
    label_of,
    producer,
)

FUSED = "quant2e_fused_batch_norms"
"""Key in ``gm.meta`` of a prepared graph: the `FusedNorm` records of its rewritten batch norms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedNorm:
    """One rewritten pair, by node names.

    ``scaled``: the weight times ``s``. ``old_weight``, ``old_bias``: the operands before. ``unscaled``: the nodes that
    undo the scaling behind ``mac``. ``bias_observer``: the submodule that will give the folded bias its encoding, if
    any will.
    """

    mac: str
    norm: str
    scaled: str
    old_weight: str
    old_bias: str | None
    unscaled: tuple[str, ...]
    bias_observer: str | None = None


def trainable_norms(gm: GraphModule) -> Iterator[tuple[Node, Node]]:
    """``(mac, norm)`` for every batch norm with running statistics that directly follows an op with a constant weight.

    Nothing else reads the op's result. In training and in evaluation mode.
    """
    norms = [node for node in gm.graph.nodes if node.target is aten.batch_norm.default]
    constants = Constants(gm.graph) if norms else ()
    for norm in norms:
        statistics = [operand(norm, name) for name in ("running_mean", "running_var")]
        affine = [operand(norm, name) for name in ("weight", "bias")]
        if not all(_is_attribute(node) for node in statistics):
            continue
        if not all(node is None or _is_attribute(node) for node in affine):
            continue
        mac = producer(norm)
        if mac is None or mac is not operand(norm, "input"):
            continue
        weight, bias = operand(mac, "weight"), operand(mac, "bias")
        if weight in constants and (bias is None or bias in constants):
            yield mac, norm


def _is_attribute(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def fuse(gm: GraphModule, pairs: Sequence[tuple[Node, Node]]) -> tuple[FusedNorm, ...]:
    """Rewrite ``pairs`` of ``gm`` in place, and say what went where. Linear in their number.

    A pair that is called twice has its weight scaled once. Values in ``meta["val"]`` are set where others look for
    them.
    """
    made: dict[tuple[Any, ...], tuple[Node, Node]] = {}
    with torch.no_grad():
        return tuple(_fuse(gm, mac, norm, made) for mac, norm in pairs)


def _fuse(gm: GraphModule, mac: Node, norm: Node, made: dict[tuple[Any, ...], tuple[Node, Node]]) -> FusedNorm:
    weight, bias = operand(mac, "weight"), operand(mac, "bias")
    key = (weight, *(operand(norm, name) for name in ("weight", "running_var", "eps")), _layout(mac))
    if key not in made:
        made[key] = _scale(gm, mac, norm, weight)
    scaled, scale = made[key]
    zero = None if bias is None else emit(mac, aten.zeros_like.default, bias)
    set_operand(mac, "weight", scaled)
    value = mac.meta.get("val")
    rank = value.dim() if isinstance(value, Tensor) else 2
    along = [1, -1] + [1] * (rank - 2)
    behind = mac.next
    shaped = insert_call(behind, aten.reshape.default, (scale, along), origin=mac)
    last = insert_call(behind, aten.div.Tensor, (mac, shaped), value=value, origin=mac)
    unscaled: tuple[Node, ...] = (shaped, last)
    if bias is not None:
        set_operand(mac, "bias", zero)
        shift = insert_call(behind, aten.reshape.default, (bias, along), origin=mac)
        last = insert_call(behind, aten.add.Tensor, (last, shift), value=value, origin=mac)
        unscaled = (*unscaled, shift, last)
    norm.replace_input_with(mac, last)
    return FusedNorm(
        mac=mac.name,
        norm=norm.name,
        scaled=scaled.name,
        old_weight=weight.name,
        old_bias=None if bias is None else bias.name,
        unscaled=tuple(node.name for node in unscaled),
    )


def _scale(gm: GraphModule, mac: Node, norm: Node, weight: Node) -> tuple[Node, Node]:
    """Nodes of ``w·s`` and of ``s``, in front of ``mac``."""
    variance, gain = (_before(gm, operand(norm, name), mac) for name in ("running_var", "weight"))
    assert variance is not None
    deviation = emit(mac, aten.sqrt.default, emit(mac, aten.add.Tensor, variance, operand(norm, "eps")))
    if gain is None:
        scale = emit(mac, aten.reciprocal.default, deviation)
    else:
        if bool((attribute(gm, str(gain.target)) == 0).any()):
            gain = emit(mac, aten.where.ScalarSelf, emit(mac, aten.eq.Scalar, gain, 0), 1.0, gain)
        scale = emit(mac, aten.div.Tensor, gain, deviation)
    shape, view = _weight_shape(mac)
    factor = emit(mac, aten.reshape.default, scale, shape)
    if view is None:
        return emit(mac, aten.mul.Tensor, weight, factor), scale
    grouped = emit(mac, aten.mul.Tensor, emit(mac, aten.reshape.default, weight, view), factor)
    return emit(mac, aten.reshape.default, grouped, list(_sizes(mac))), scale


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


# ---------------------------------------------------------------- the way back


def unfuse(gm: GraphModule, fused: Sequence[FusedNorm]) -> None:
    """Fold the norms of ``fused`` into their ops by the running statistics, in place. Observers of weights stay in
    place.

    Raises `Quant2eError` when nodes that `fuse` wrote are gone.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    folded: dict[str, Node] = {}
    with torch.inference_mode(False), torch.no_grad():
        for record in fused:
            missing = [n for n in (record.mac, record.norm, record.scaled, *record.unscaled) if n not in nodes]
            if missing:
                raise Quant2eError(
                    f"the prepared graph was edited: '{missing[0]}', with which '{record.mac}' trains its batch norm "
                    f"'{record.norm}', is gone. Convert the graph as prepare_qat_pt2e made it, trained or not."
                )
            _unfuse(gm, record, nodes, folded)


def _unfuse(gm: GraphModule, record: FusedNorm, nodes: Mapping[str, Node], folded: dict[str, Node]) -> None:
    mac, norm, scaled, weight = (nodes[name] for name in (record.mac, record.norm, record.scaled, record.old_weight))
    bias = None if record.old_bias is None else nodes[record.old_bias]
    values: dict[str, Any] = {
        name: None if node is None else evaluate(gm, node).detach()
        for name, node in (
            ("w", weight),
            ("b", bias),
            *((name, operand(norm, name)) for name in ("weight", "bias", "running_mean", "running_var")),
        )
    }
    if record.scaled not in folded:
        # The very operations of the graph: the integers are those that were trained with.
        deviation = torch.sqrt(values["running_var"] + operand(norm, "eps"))
        scale = torch.reciprocal(deviation) if values["weight"] is None else values["weight"] / deviation
        tensor = _scaled_weight(mac, values["w"], scale)
        folded[record.scaled] = _place(gm, weight, weight, norm, mac, "weight", tensor, {scaled}, scaled)
        scaled.replace_all_uses_with(folded[record.scaled])
    readers = {nodes[name] for name in record.unscaled} | set(mac.all_input_nodes)
    tensor = _folded_bias(values, operand(norm, "eps"))
    moved = _place(gm, bias, weight, norm, mac, "bias", tensor, readers, mac)
    if record.bias_observer is not None:
        with gm.graph.inserting_before(mac):
            observed = gm.graph.call_module(record.bias_observer, (moved,))
        set_origin(observed, mac, value=moved.meta.get("val"))
        moved = observed
    set_operand(mac, "bias", moved)
    norm.replace_all_uses_with(mac)
    gm.graph.erase_node(norm)
    for name in reversed(record.unscaled):
        gm.graph.erase_node(nodes[name])
    mac.meta[FOLDED] = [*mac.meta.get(FOLDED, ()), norm.name]


def _scaled_weight(mac: Node, weight: Tensor, scale: Tensor) -> Tensor:
    transposed, groups = _layout(mac)
    kernel = [1] * (weight.dim() - 2)
    if not transposed:
        return weight * scale.reshape([-1, 1, *kernel])
    if groups == 1:
        return weight * scale.reshape([1, -1, *kernel])
    view = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (view * scale.reshape([groups, 1, weight.shape[1], *kernel])).reshape(weight.shape)


def _folded_bias(values: Mapping[str, Any], eps: float) -> Tensor:
    """``(b - m)·s + h``, in the order of ``torch.nn.utils.fusion``."""
    mean, var = values["running_mean"], values["running_var"]
    bias = torch.zeros_like(mean) if values["b"] is None else values["b"]
    gain = torch.ones_like(mean) if values["weight"] is None else values["weight"]
    shift = torch.zeros_like(mean) if values["bias"] is None else values["bias"]
    moved: Tensor = (bias - mean) * torch.rsqrt(var + eps) * gain + shift
    return moved.to(mean.dtype if values["b"] is None else bias.dtype)


def _place(
    gm: GraphModule,
    old: Node | None,
    weight: Node,
    norm: Node,
    mac: Node,
    role: str,
    tensor: Tensor,
    readers: set[Node],
    before: Node,
) -> Node:
    """Register a folded tensor, under the path of the old one where ``readers`` are all that reads it;
    a node for it.
    """
    path = None
    if old is not None and old.op == "get_attr":
        alike = list(gm.graph.find_nodes(op="get_attr", target=old.target))
        if alike == [old] and readers.issuperset(old.users):
            path = str(old.target)
        else:
            path = free_path(gm, f"{old.target}_{label_of(norm)}")
    elif weight.op == "get_attr":
        path = free_path(gm, (str(weight.target).rpartition(".")[0] + f".{role}").removeprefix("."))
    if path is None:
        path = free_path(gm, f"{mac.name}_{role}")
    replace_tensor(gm, path, torch.nn.Parameter(tensor, requires_grad=False))
    return emit_read(gm, before, path, origin=mac)
