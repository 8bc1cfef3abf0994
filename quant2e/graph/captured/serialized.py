"""Serialization of a graph as plain data, so that a captured module can be pickled and sent to another process.

Kept: nodes, names, the calling convention, and of the metadata what is plain data, module paths and source lines, and
the example value of tensors of fixed size. Lost: other metadata, example values of dynamic size among it. To keep a
model, use `quant2e.save`, which loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.node import map_aggregate, map_arg


@dataclass(frozen=True, slots=True)
class _Operand:
    """Stands for a node among the arguments of another."""

    name: str


@dataclass(frozen=True, slots=True)
class _Op:
    """An ATen (or other dispatcher) op, or a higher-order op, by name: the objects themselves cannot be pickled."""

    name: str
    overload: str | None

    def resolve(self) -> Any:
        if self.overload is None:
            return getattr(torch.ops.higher_order, self.name)
        namespace, _, op = self.name.partition("::")
        return getattr(getattr(getattr(torch.ops, namespace), op), self.overload)


@dataclass(frozen=True, slots=True)
class _Example:
    """A tensor without data."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def resolve(self, mode: FakeTensorMode) -> Tensor:
        with mode:
            return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node. Operands in ``args`` and ``kwargs`` are replaced by their names."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class GraphState:
    """A graph: its nodes in order, and how nested inputs and outputs are flattened (names, input spec, output spec)."""

    nodes: tuple[NodeState, ...]
    convention: tuple[list[str], Any, Any] | None


def graph_state(graph: Graph) -> GraphState:
    """``graph`` as data that can be pickled."""
    convention = None
    if isinstance(graph._codegen, _PyTreeCodeGen):
        info = graph._codegen.pytree_info
        convention = (list(info.orig_args), spec_state(info.in_spec), spec_state(info.out_spec))
    return GraphState(tuple(_node_state(node) for node in graph.nodes), convention)


def graph_from_state(state: GraphState) -> Graph:
    """The graph that `graph_state` wrote down."""
    graph = Graph()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    nodes: dict[str, Node] = {}

    def decode(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Operand) else value

    for saved in state.nodes:
        args, kwargs = map_aggregate(saved.args, decode), map_aggregate(saved.kwargs, decode)
        target = saved.target.resolve() if isinstance(saved.target, _Op) else saved.target
        node = graph.create_node(saved.op, target, args, kwargs, saved.name)
        if node.name != saved.name:
            node.name = saved.name
        node.meta = dict(saved.meta)
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(
                lambda v: v.resolve(mode) if isinstance(v, _Example) else v, node.meta["val"]
            )
        nodes[node.name] = node
    if state.convention is not None:
        names, in_spec, out_spec = state.convention
        graph._codegen = _PyTreeCodeGen(_PyTreeInfo(names, spec_from_state(in_spec), spec_from_state(out_spec)))
    return graph


def spec_state(spec: pytree.TreeSpec | None) -> str | pytree.TreeSpec | None:
    """A nesting as text; as it is, where it holds a type that torch cannot name (an unregistered named tuple)."""
    try:
        return None if spec is None else str(pytree.treespec_dumps(spec))
    except NotImplementedError:
        return spec


def spec_from_state(state: str | pytree.TreeSpec | None) -> Any:
    """The nesting that `spec_state` wrote down."""
    return pytree.treespec_loads(state) if isinstance(state, str) else state


def plain(value: Any) -> Any:
    """``value`` when it is plain data (nested), classes by their names; raises ``TypeError`` for anything else."""
    if value is None or isinstance(value, (str, int, float, torch.dtype, torch.device)):
        return value
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value) in (tuple, list):
        return type(value)(plain(item) for item in value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} is not plain data")


def plain_entries(meta: Mapping[Any, Any]) -> dict[Any, Any]:
    """The entries of ``meta`` that are plain data."""
    kept = {}
    for key, value in meta.items():
        try:
            kept[plain(key)] = plain(value)
        except TypeError:
            continue
    return kept


def _node_state(node: Node) -> NodeState:
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: _Operand(n.name))  # type: ignore[arg-type,return-value]
    meta = plain_entries(node.meta)
    try:
        meta["val"] = pytree.tree_map(_example, node.meta["val"])
    except (KeyError, TypeError):
        meta.pop("val", None)
    return NodeState(node.op, node.name, _target(node.target), args, kwargs, meta)


def _target(target: Any) -> Any:
    if isinstance(target, OpOverload):
        return _Op(target._schema.name, target._overloadname)
    if isinstance(target, HigherOrderOperator):
        return _Op(target.name(), None)
    return target


def _example(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return plain(value)
    sizes = (*value.shape, *value.stride())
    if any(type(size) is not int for size in sizes):
        raise TypeError("a tensor of dynamic size")
    return _Example(tuple(value.shape), tuple(value.stride()), value.dtype, str(value.device))
