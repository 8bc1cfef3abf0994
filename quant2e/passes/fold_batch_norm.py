"""Batch norm folding: in evaluation mode, a scale and a shift per channel that the op before it can do.

batch_norm(mac(x, w, b), g, h, m, v, eps)  =  mac(x, w·s, (b - m)·s + h),   s = g / sqrt(v + eps)

``mac`` is a convolution, a transposed convolution or a linear. Between it and the norm only moves of axes may stand.
Formulas and their order of operations: ``torch.nn.utils.fusion``.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from quant2e.graph.attributes import attribute, free_path, replace_tensor
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.dataflow import operand, set_operand
from quant2e.graph.edit import emit_read, fold_into
from quant2e.graph.effects import aten, flag_of
from quant2e.passes.dead_code import prune_unused_attributes, remove_dead_code

_CONV = frozenset(
    {
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
    }
)
TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input})
GENERAL = frozenset({aten.convolution.default})
LINEAR = frozenset({aten.linear.default})
_MACS = _CONV | TRANSPOSED | GENERAL | LINEAR

_NORMS = frozenset(
    {
        aten._native_batch_norm_legit.default,
        aten._native_batch_norm_legit_no_training.default,
        aten.batch_norm.default,
        aten.native_batch_norm.default,
    }
)

NORMALIZED = "quant2e_normalized"
"""Metadata of an op that a batch norm was folded into: what its result has, per channel, on the data of training, the
mean (the norm's bias) and the standard deviation (the size of its weight); a pair of 1-D tensors."""

_Claims = dict[int, set[Any]]
"""Who reads a tensor, by the tensor's ``id``: the ``get_attr`` nodes, and their users; alike folds count once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One batch norm and the op that takes it over.

    ``mac``, ``norm``: node names. ``weight``, ``bias``: attribute paths of the folded tensors.
    ``old_weight``, ``old_bias``: names of the nodes that were the operands before; None where there was no bias.
    """

    mac: str
    norm: str
    weight: str
    bias: str
    old_weight: str
    old_bias: str | None


@dataclass(frozen=True, slots=True)
class _Match:
    mac: Node
    norm: Node

    def key(self) -> tuple[Any, ...]:
        """What determines the folded tensors: two uses of one conv and one norm can share them."""
        parts = [operand(self.norm, name) for name in ("weight", "bias", "running_mean", "running_var", "eps")]
        return (operand(self.mac, "weight"), operand(self.mac, "bias"), *parts)


def fold_batch_norm(gm: GraphModule) -> int:
    """`fold` as a pass, which also drops the parameters that nothing reads any more; returns how many norms."""
    folds = fold(gm)
    if folds:
        remove_dead_code(gm)
        prune_unused_attributes(gm)
    return len(folds)


def fold(gm: GraphModule) -> tuple[Fold, ...]:
    """Fold batch norms of ``gm`` in place, where that is exact, and say what went where.

    Folded: evaluation mode with running statistics, all parameters constant, no other reader of the op's result.
    The new tensors take the place of the old ones; of a weight with other uses (tied weights, one conv under two norms)
    a copy is folded, under a new name. Tensors of the caller's model are never written. The op keeps its name and
    metadata, and the norm's name among its `folded_ops`. Linear in the graph.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _fold(gm)


def _fold(gm: GraphModule) -> tuple[Fold, ...]:
    matches = _find(gm)
    placed: dict[tuple[Any, ...], tuple[Node, Node]] = {}
    folds = []
    claims = _claims(gm, matches)
    for match in matches:
        mac, norm, key = match.mac, match.norm, match.key()
        old_weight, old_bias = operand(mac, "weight"), operand(mac, "bias")
        if key not in placed:
            weight, bias = _folded_tensors(gm, match)
            placed[key] = (
                _place(gm, match, "weight", old_weight, weight, claims),
                _place(gm, match, "bias", old_bias, bias, claims),
            )
        for name, node in zip(("weight", "bias"), placed[key], strict=True):
            set_operand(mac, name, node)
        mac.meta[NORMALIZED] = _result_of_norm(gm, norm)
        _bypass(norm)
        fold_into(mac, norm.name)
        folds.append(
            Fold(
                mac=mac.name,
                norm=norm.name,
                weight=str(placed[key][0].target),
                bias=str(placed[key][1].target),
                old_weight=old_weight.name,
                old_bias=None if old_bias is None else old_bias.name,
            )
        )
    return tuple(folds)


def _find(gm: GraphModule) -> list[_Match]:
    constants = Constants(gm.graph)
    matches = []
    for norm in gm.graph.nodes:
        if norm.target not in _NORMS or not _is_affine(norm, constants):
            continue
        mac = producer(norm)
        if mac is None:
            continue
        weight, bias = operand(mac, "weight"), operand(mac, "bias")
        if weight in constants and (bias is None or bias in constants):
            matches.append(_Match(mac, norm))
    return matches


def _is_affine(norm: Node, constants: Constants) -> bool:
    """Does the norm scale and shift by constants? Only its normalised result may be used."""
    if norm.target is not aten._native_batch_norm_legit_no_training.default:
        flag = flag_of(norm)
        if flag is None or operand(norm, flag):
            return False
    statistics = [operand(norm, name) for name in ("running_mean", "running_var")]
    affine = [operand(norm, name) for name in ("weight", "bias")]
    if not all(value in constants for value in statistics):
        return False
    if not all(value is None or value in constants for value in affine):
        return False
    if norm.target is aten.batch_norm.default:
        return True
    return all(u.target is operator.getitem and (u.args[1] == 0 or not u.users) for u in norm.users)


def producer(norm: Node) -> Node | None:
    """The op whose channels are the norm's, when the norm is all that reads it."""
    axis, node = 1, operand(norm, "input")
    while isinstance(node, Node) and len(node.users) == 1 and isinstance(node.meta.get("val"), Tensor):
        rank = node.meta["val"].dim()
        if node.target in _MACS:
            return node if rank >= 2 and channel_axis(node) == axis else None
        source = _axis_before(node, axis, rank)
        if source is None:
            return None
        axis, node = source, operand(node, "self")
    return None


def channel_axis(mac: Node) -> int:
    """Which axis of the result of a convolution, transposed convolution or linear is that of its channels."""
    rank = int(mac.meta["val"].dim())
    return rank - 1 if mac.target in LINEAR else rank - (_weight_rank(mac) - 2) - 1


def _weight_rank(mac: Node) -> int:
    weight = operand(mac, "weight")
    value = weight.meta.get("val") if isinstance(weight, Node) else None
    return value.dim() if isinstance(value, Tensor) else 0


def _axis_before(node: Node, axis: int, rank: int) -> int | None:
    """Which axis of its input becomes ``axis`` of a node that only moves axes; None for other nodes."""
    if node.target in (aten.contiguous.default, aten.clone.default):
        return axis
    if node.target is aten.permute.default:
        dims = operand(node, "dims")
        return int(dims[axis] % rank)
    if node.target is aten.transpose.int:
        first, second = operand(node, "dim0") % rank, operand(node, "dim1") % rank
        return int({first: second, second: first}.get(axis, axis))
    return None


def _folded_tensors(gm: GraphModule, match: _Match) -> tuple[Tensor, Tensor]:
    mac, norm = match.mac, match.norm
    value: dict[str, Any] = {
        name: None if node is None else evaluate(gm, node).detach()
        for name, node in (
            ("w", operand(mac, "weight")),
            ("b", operand(mac, "bias")),
            *((name, operand(norm, name)) for name in ("weight", "bias", "running_mean", "running_var")),
        )
    }
    w, b, mean, var, eps = value["w"], value["b"], value["running_mean"], value["running_var"], operand(norm, "eps")
    gain = torch.ones_like(mean) if value["weight"] is None else value["weight"]
    shift = torch.zeros_like(mean) if value["bias"] is None else value["bias"]
    if mac.target in LINEAR:
        weight, bias = fuse_linear_bn_weights(w, b, mean, var, eps, gain, shift)
        return weight.data, bias.data
    transposed = mac.target in TRANSPOSED or (mac.target in GENERAL and operand(mac, "transposed"))
    groups = operand(mac, "groups")
    if not transposed or groups == 1:
        weight, bias = fuse_conv_bn_weights(w, b, mean, var, eps, gain, shift, transpose=transposed)
        return weight.data, bias.data
    # A transposed weight is (in, out / groups, *kernel), group by group along axis 0: one call per group.
    chunks = [(None,) * groups if t is None else t.chunk(groups) for t in (w, b, mean, var, gain, shift)]
    parts = [
        fuse_conv_bn_weights(wg, bg, mg, vg, eps, gg, hg, transpose=True)
        for wg, bg, mg, vg, gg, hg in zip(*chunks, strict=True)
    ]
    return torch.cat([part.data for part, _ in parts]), torch.cat([part.data for _, part in parts])


def _result_of_norm(gm: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    mean = evaluate(gm, operand(norm, "running_mean")).detach()
    gain, shift = (operand(norm, name) for name in ("weight", "bias"))
    return (
        torch.zeros_like(mean) if shift is None else evaluate(gm, shift).detach(),
        torch.ones_like(mean) if gain is None else evaluate(gm, gain).detach().abs(),
    )


def _claims(gm: GraphModule, matches: list[_Match]) -> _Claims:
    keys = {match.mac: match.key() for match in matches}
    uses: dict[int, set[Any]] = defaultdict(set)
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = id(attribute(gm, str(node.target)))
        uses[tensor].add(("reader", node))
        for user in node.users:
            roles = [name for name in ("weight", "bias") if user in keys and operand(user, name) is node]
            reads = sum(value is node for value in (*user.args, *user.kwargs.values()))
            uses[tensor].add((keys[user], roles[0]) if roles and reads == 1 else user)
    return uses


def _is_exclusive(uses: set[Any]) -> bool:
    """One node reads the tensor, and one kind of fold reads that node: the tensor can be replaced where it lies."""
    return len(uses) == 2


def _place(gm: GraphModule, match: _Match, role: str, old: Node | None, tensor: Tensor, claims: _Claims) -> Node:
    """Register ``tensor`` and give the node that reads it: the old one where nothing else reads the old tensor."""
    weight = operand(match.mac, "weight")
    requires_grad = _requires_grad(gm, old if old is not None else weight)
    parameter = torch.nn.Parameter(tensor, requires_grad)
    if old is not None and old.op == "get_attr":
        if _is_exclusive(claims[id(attribute(gm, str(old.target)))]):
            replace_tensor(gm, str(old.target), parameter)
            return old
        base = f"{old.target}_{label_of(match.norm)}"
    elif weight.op == "get_attr":
        base = str(weight.target).rpartition(".")[0] + f".{role}"
    else:
        base = f"{match.mac.name}_{role}"
    path = free_path(gm, base.removeprefix("."))
    replace_tensor(gm, path, parameter)
    behind = old if old is not None else weight
    return emit_read(gm, behind.next, path, origin=match.mac)


def _requires_grad(gm: GraphModule, node: Node) -> bool:
    return node.op == "get_attr" and bool(attribute(gm, str(node.target)).requires_grad)


def label_of(norm: Node) -> str:
    """Short name of a norm: its module's, or its node's."""
    mean = operand(norm, "running_mean")
    module = str(mean.target).rpartition(".")[0] if mean.op == "get_attr" else ""
    return module.replace(".", "_") or norm.name


def _bypass(norm: Node) -> None:
    """Let the readers of the norm's result read its input, and remove the norm."""
    source = operand(norm, "input")
    if norm.target is aten.batch_norm.default:
        norm.replace_all_uses_with(source)
    else:
        for item in list(norm.users):
            item.replace_all_uses_with(source)
            norm.graph.erase_node(item)
    norm.graph.erase_node(norm)
