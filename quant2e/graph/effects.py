"""Effects of a node besides its value: what it writes, what its result aliases, what it draws at random.

Read from the op's schema (``Tensor(a!)`` is written, ``Tensor(a) -> Tensor(a)`` shares memory), plus the few ATen ops
whose schema is silent about it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from quant2e.graph.control_flow import bodies, has_bodies, operands_of_bodies
from quant2e.graph.dataflow import operand

aten = torch.ops.aten

_SILENT_ALIASES = frozenset(
    {
        aten._unsafe_view.default,
        aten.alpha_dropout.default,
        aten.atleast_1d.default,
        aten.atleast_2d.default,
        aten.atleast_3d.default,
        aten.broadcast_tensors.default,
        aten.dropout.default,
        aten.feature_alpha_dropout.default,
        aten.feature_dropout.default,
        aten.meshgrid.default,
        aten.meshgrid.indexing,
        aten.sum_to_size.default,
        aten.type_as.default,
    }
)
"""Ops that may hand back their input (or a view of it) although their schema says they return a new tensor."""

_UNINITIALISED = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_permuted.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)

_METADATA_WRITES = frozenset({aten.detach_.default})
"""In-place ops that change no element: ``torch.tensor(...)`` in a forward is exported with one."""

_SCALAR_FUNCTIONS = frozenset(
    {operator.getitem, torch.sym_float, torch.sym_int, torch.sym_max, torch.sym_min, torch.sym_not}
)

BATCH_NORMS = frozenset(
    {
        aten._native_batch_norm_legit.default,
        aten._native_batch_norm_legit.no_stats,
        aten.batch_norm.default,
        aten.cudnn_batch_norm.default,
        aten.native_batch_norm.default,
    }
)
_NORMS = BATCH_NORMS | {aten.instance_norm.default}

TRAINING_ARGUMENTS = ("train", "training", "use_input_stats")
"""Names, in ATen schemas, of the flag that says whether the op behaves as in training."""


@cache
def _flag_in(target: OpOverload) -> str | None:
    names = [declared.name for declared in target._schema.arguments]
    return next((name for name in TRAINING_ARGUMENTS if name in names), None)


def flag_of(node: Node) -> str | None:
    """Name of the argument that puts the node into training mode; None when it behaves the same in both modes."""
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    flag = _flag_in(target)
    if flag is not None and target in _NORMS and operand(node, "running_mean") is None:
        return None  # a norm without running statistics uses those of the batch in both modes
    return flag


def trains(node: Node) -> bool:
    """Does the node drop values, or use and update batch statistics, as in training?"""
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(operand(node, "dropout_p"))
    flag = flag_of(node)
    if flag is None or not operand(node, flag):
        return False
    # Dropping out with probability 0 is no training: recurrent layers have "dropout", the others "p".
    return bool(operand(node, "p", operand(node, "dropout", 1.0)))


def _tensors(node: Node, names: Iterable[str]) -> Iterator[Node]:
    """The nodes among the arguments of these names."""
    for name in names:
        value = operand(node, name)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Node):
                yield item


@cache
def _written(target: OpOverload) -> tuple[str, ...]:
    """Names of the arguments that the schema says are written."""
    return tuple(a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write)


@cache
def _shared(target: OpOverload) -> tuple[str, ...]:
    """Names of the arguments whose memory the schema says the results may share."""
    shared = [a for r in target._schema.returns if r.alias_info for a in r.alias_info.before_set]
    return tuple(
        a.name
        for a in target._schema.arguments
        if a.alias_info is not None and not a.alias_info.before_set.isdisjoint(shared)
    )


def writes(node: Node) -> list[Node]:
    """Nodes whose tensor the node changes in place (elements, not metadata)."""
    if has_bodies(node):
        return _written_by_bodies(node)
    if not isinstance(node.target, OpOverload) or node.target in _METADATA_WRITES:
        return []
    written = list(_tensors(node, _written(node.target)))
    if trains(node):  # batch and instance norm update running statistics, unannotated in the schema
        written += _tensors(node, ("running_mean", "running_var"))
    return written


def _written_by_bodies(node: Node) -> list[Node]:
    """Operands that the bodies of a node change in place; all of them, where it is not known which is which."""
    written: dict[Node, None] = {}
    for body in bodies(node).values():
        inputs = [each for each in body.graph.nodes if each.op == "placeholder"]
        shared: dict[Node, frozenset[Node]] = {}
        for each in body.graph.nodes:
            shared[each] = frozenset({each}).union(*(shared[base] for base in aliases(each)))
        touched = frozenset[Node]().union(*(shared[operand] for each in body.graph.nodes for operand in writes(each)))
        given = operands_of_bodies(node)
        if touched and given is None:
            return list(node.all_input_nodes)
        written |= {
            operand: None
            for operand, each in zip(given or (), inputs, strict=False)
            if each in touched and isinstance(operand, Node)
        }
    return list(written)


def aliases(node: Node) -> list[Node]:
    """Nodes whose memory the node's result may share."""
    if node.target is operator.getitem:
        return list(node.all_input_nodes[:1])
    if has_bodies(node):
        return list(node.all_input_nodes)
    if not isinstance(node.target, OpOverload):
        return []
    if node.target in _SILENT_ALIASES:
        return list(node.all_input_nodes)
    return list(_tensors(node, _shared(node.target)))


def is_view(node: Node) -> bool:
    """Does the node only give its operand another shape or name? Its result may share the operand's memory."""
    return bool(aliases(node)) and not is_in_place(node)


def is_in_place(node: Node) -> bool:
    """Does the node's op change an operand, be it its elements (`writes`) or only its metadata (``detach_``)?"""
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def is_random(node: Node) -> bool:
    """Does the node draw random numbers? Dropout in eval mode does not."""
    if has_bodies(node):
        return any(is_random(n) for body in bodies(node).values() for n in body.graph.nodes)
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    switches = flag_of(node) is not None or node.target is aten.scaled_dot_product_attention.default
    return trains(node) if switches else True


def is_deterministic(node: Node) -> bool:
    """Is the node's value a function of what its operands hold when it runs?"""
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return not (is_random(node) or node.target in _UNINITIALISED)
    if has_bodies(node):
        return False
    if isinstance(node.target, OpOverloadPacket):  # without its overload, as observers of other libraries write it
        overloads = [getattr(node.target, name) for name in node.target.overloads()]
        seeded = torch.Tag.nondeterministic_seeded
        return not any(o._schema.is_mutable or seeded in o.tags for o in overloads)
    return node.target in _SCALAR_FUNCTIONS or getattr(node.target, "__module__", "") in ("_operator", "math")
