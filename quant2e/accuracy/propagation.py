"""PT2E's numeric debugger: the tensors of two graphs, logged and compared by the op of the exported graph they are of.

    reference, tested = map(prepare_for_propagation_comparison, (captured, converted))
    for model in (reference, tested): model(*inputs)
    compare_results(*map(extract_results_from_loggers, (reference, tested)))

It keeps every tensor of every call and compares what reaches an op, inherited errors included. `quant2e.compare` keeps
sums, and tells the error that an op makes itself; these are the names that scripts of PT2E import.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn import functional
from torch.utils import _pytree as pytree

from quant2e.errors import Quant2eError, module_path
from quant2e.graph.attributes import first_free
from quant2e.graph.captured.capture import as_graph_module
from quant2e.graph.captured.module import CapturedModule
from quant2e.graph.edit import FROM_NODE, folded_ops

NUMERIC_DEBUG_HANDLE = "numeric_debug_handle"
"""Key under ``meta["custom"]`` that `generate_numeric_debug_handle` numbers nodes with."""


@dataclass(frozen=True, slots=True)
class NodeSource:
    """An op of the graph that was exported first, by which tensors of later graphs are matched."""

    name: str
    graph_id: int


class OutputLogger(nn.Module):
    """Keeps, in ``stats``, what one node gave in each call."""

    _is_impure = True  # dead-code elimination leaves its calls alone

    def __init__(self, source: NodeSource, node_name: str, module: str) -> None:
        super().__init__()
        self.source = source
        self.node_name = node_name
        self.module = module
        self.stats: list[Any] = []

    def forward(self, x: Any) -> Any:
        """``x``, of any kind."""
        self.stats.append(pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), x))
        return x


@dataclass(frozen=True, slots=True)
class LoggedNode:
    """A node's name, the path of its module, and what it gave in each call."""

    node_name: str
    module: str
    stats: tuple[Any, ...]


@dataclass(frozen=True, slots=True, repr=False)
class QuantizationComparisonResult:
    """What one op gave in one call, quantized and in float. Raises `Quant2eError` where shapes or structure differ."""

    actual: Any
    ref: Any

    def __post_init__(self) -> None:
        (left, one), (right, other) = map(pytree.tree_flatten, (self.actual, self.ref))
        if one != other or [_shape(x) for x in left] != [_shape(x) for x in right]:
            raise Quant2eError(f"results of different shapes: {list(map(_shape, left))} and {list(map(_shape, right))}")

    def loss(self, function: Callable[[Tensor, Tensor], Tensor]) -> Any:
        """``function(actual, ref)`` of the tensors, in float32, in the structure of the result."""
        flat, spec = pytree.tree_flatten(self.actual)
        pairs = zip(flat, pytree.tree_leaves(self.ref), strict=True)
        found = [function(a.float(), b.float()) if isinstance(a, Tensor) else None for a, b in pairs]
        return pytree.tree_unflatten(found, spec)

    @property
    def mse_loss(self) -> Any:
        """Mean squared error."""
        return self.loss(functional.mse_loss)

    @property
    def sqnr(self) -> Any:
        """Signal to quantization noise ratio in dB, of the float result's power."""
        return self.loss(lambda actual, ref: 20.0 * torch.log10(ref.norm() / (ref - actual).norm()))

    def __repr__(self) -> str:
        return f"QuantizationComparisonResult(mse_loss={self.mse_loss}, sqnr={self.sqnr})"


@dataclass(frozen=True, slots=True)
class NodeAccuracySummary:
    """One op in both graphs, and its results call by call."""

    debug_info: NodeSource
    actual_node_name: str
    actual_module_stack: str
    ref_node_name: str
    ref_module_stack: str
    results: tuple[QuantizationComparisonResult, ...]


def generate_numeric_debug_handle(ep: ExportedProgram) -> None:
    """Number the ops of a program, in place, under ``meta["custom"]``; what has a number keeps it.

    Nothing here needs the numbers: ops are matched by their origin. Raises `Quant2eError` for anything else.
    """
    if not isinstance(ep, ExportedProgram):
        raise Quant2eError(f"generate_numeric_debug_handle takes an ExportedProgram, not a {type(ep).__name__}")
    nodes = [node for node in ep.graph.nodes if node.op == "call_function"]
    known = [node.meta.get("custom", {}).get(NUMERIC_DEBUG_HANDLE, 0) for node in nodes]
    following = max(known, default=0) + 1
    for node in nodes:
        custom = node.meta.setdefault("custom", {})
        if NUMERIC_DEBUG_HANDLE not in custom:
            custom[NUMERIC_DEBUG_HANDLE] = following
            following += 1


def prepare_for_propagation_comparison(model: GraphModule) -> CapturedModule:
    """A copy of a captured, prepared or converted graph with an `OutputLogger` behind every op of known origin."""
    gm = as_graph_module(model)
    for node in list(gm.graph.nodes):
        source = _source(node)
        if source is None:
            continue
        name = first_free(gm, (f"{node.name}_logger_{number}" for number in itertools.count()))
        gm.add_submodule(name, OutputLogger(source, node.name, module_path(node)))
        with gm.graph.inserting_after(node):
            logger = gm.graph.call_module(name, (node,))
        logger.meta = {key: node.meta[key] for key in ("val",) if key in node.meta}
        node.replace_all_uses_with(logger, delete_user_cb=lambda user, logger=logger: user is not logger)
    gm.recompile()
    return gm


def extract_results_from_loggers(model: GraphModule) -> dict[NodeSource, LoggedNode]:
    """What the loggers of a graph kept, by the op that the tensor is of: where several are, the last one in the graph.

    In a converted graph that is the tensor behind quantize and dequantize.
    """
    loggers = [module for module in model.children() if isinstance(module, OutputLogger) and module.stats]
    return {one.source: LoggedNode(one.node_name, one.module, tuple(one.stats)) for one in loggers}


def compare_results(
    ref_results: Mapping[NodeSource, LoggedNode], actual_results: Mapping[NodeSource, LoggedNode]
) -> dict[NodeSource, NodeAccuracySummary]:
    """The ops that both have, with their results beside each other, call by call.

    Raises `Quant2eError` where the shapes of a result differ.
    """
    return {
        source: NodeAccuracySummary(
            source,
            actual.node_name,
            actual.module,
            ref.node_name,
            ref.module,
            tuple(QuantizationComparisonResult(a, b) for a, b in zip(actual.stats, ref.stats, strict=False)),
        )
        for source, ref in ref_results.items()
        if (actual := actual_results.get(source)) is not None
    }


def _source(node: Node) -> NodeSource | None:
    """The op of the first exported graph that a node's tensor is of; None for inputs and what has no such origin."""
    history = node.meta.get(FROM_NODE)
    value = node.meta.get("val")
    if node.op not in ("call_function", "call_module") or not history or not isinstance(value, Tensor | tuple | list):
        return None
    source = history[-1]
    while source.from_node:
        source = source.from_node[-1]
    folded = folded_ops(node)  # a convolution with a batch norm in it gives what the batch norm gave
    return NodeSource(folded[-1] if folded else source.name, source.graph_id)


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
