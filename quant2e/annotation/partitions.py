"""Source partitions: the ops that a module or function was exported as, for quantizers that move over from PT2E.

Our own quantizers match ATen ops (`quant2e.annotation.pattern`); these work on what ``torch.fx`` records about the
source.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from quant2e.errors import Quant2eError
from quant2e.graph.control_flow import bodies

if TYPE_CHECKING:
    from torch.fx.passes.utils.source_matcher_utils import SourcePartition

_equivalent: list[set[Any]] = [
    {nn.Conv1d, F.conv1d},
    {nn.Conv2d, F.conv2d},
    {nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d},
    {nn.ReLU, F.relu, F.relu_},
    {nn.BatchNorm2d, F.batch_norm},
    {nn.Hardtanh, F.hardtanh, F.hardtanh_},
    {torch.add, operator.add, operator.iadd, "add", "add_"},
    {torch.mul, operator.mul, operator.imul, "mul", "mul_"},
]


def get_equivalent_types() -> list[set[Any]]:
    """Sets of module types, functions and method names that mean the same op."""
    return _equivalent


def update_equivalent_types_dict(customized_equivalent_types: Sequence[Collection[Any]] | None = None) -> None:
    """Replace the sets that `get_equivalent_types` gives, for the whole process. Raises ValueError for None."""
    if customized_equivalent_types is None:
        raise ValueError("give the sets of types that are equivalent; an empty list for none")
    _equivalent[:] = [set(types) for types in customized_equivalent_types]


def _spellings(kind: Any) -> list[Any]:
    return list(dict.fromkeys([kind, *(other for types in _equivalent if kind in types for other in types)]))


def find_sequential_partitions(
    gm: GraphModule,
    partition_types: Sequence[Any],
    include_functional_equivalent: bool = True,
    filter_fn: Callable[[Node], bool] | None = None,
) -> list[tuple[SourcePartition, ...]]:
    """Chains of partitions, each feeding the next, that were written as ``partition_types``.

    A type also matches its equivalents unless ``include_functional_equivalent`` is False. Raises ValueError when two
    of the types mean the same op.
    """
    # Importing this part of torch.fx registers a logger; importing quant2e changes nothing global.
    from torch.fx.passes.utils.source_matcher_utils import check_subgraphs_connected, get_source_partitions

    spellings = [_spellings(kind) if include_functional_equivalent else [kind] for kind in partition_types]
    flat = [kind for kinds in spellings for kind in kinds]
    if len(set(flat)) != len(flat):
        raise ValueError(
            f"each type of a sequence must be a different op, but two of {list(partition_types)} are the same"
        )
    found = [
        list(itertools.chain.from_iterable(get_source_partitions(gm.graph, kinds, filter_fn).values()))
        for kinds in spellings
    ]
    return [
        chain
        for chain in itertools.product(*found)
        if all(check_subgraphs_connected(a, b) for a, b in itertools.pairwise(chain))
    ]


def bfs_trace_with_node_process(model: ExportedProgram | GraphModule, node_op: Callable[[Node], None]) -> None:
    """Call ``node_op`` on every node but inputs and outputs, and then on those of control-flow bodies, level by
    level.
    """
    if not isinstance(model, (ExportedProgram, GraphModule)):
        raise Quant2eError(f"a graph is needed, and this is a {type(model).__name__}")
    queue = [model.graph_module if isinstance(model, ExportedProgram) else model]
    for gm in queue:
        for node in gm.graph.nodes:
            if node.op not in ("output", "placeholder"):
                node_op(node)
        for node in gm.graph.nodes:
            if node.op == "call_function":
                queue.extend(bodies(node).values())
