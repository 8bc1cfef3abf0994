"""XNNPACK's partitioner, which says what it takes, with our rule for what goes together.

Its own rule tries to join each pair of partitions once, in the order of the graph, which leaves a model whose blocks
share a chain or a mask in pieces, and takes time that grows with the square of their number.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.partitioner import Partition
from torch.utils import _pytree as pytree

from lowering.executorch.xnnpack.legalize.requirements import MOST_DIMENSIONS, fixed, of_images
from lowering.executorch.xnnpack.lookup_tables import beside_tables, beside_tables_in, parted
from lowering.executorch.xnnpack.stages import stages
from lowering.export import drop_from_node
from quant2e.errors import LoweringError, where
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import node_tensor, shape_of
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE

BESIDE_TABLE = (
    "in a delegate XNNPACK would join it with the lookup table in front of it, and free the table while in use"
)

GROWING_FLOAT16 = "XNNPACK's mean of float16 writes behind its memory when a call is larger than the first"

SOFTMAX_OF_IMAGES = "XNNPACK's softmax is along the last axis in memory, which may be the channels of what it reads"

OTHER_MAXIMUM = "XNNPACK's maximum is along height or width, axes 2 and 3 of four, and keeps the axis"


def xnnpack_partitioner() -> Any:
    """A partitioner for ``to_edge_transform_and_lower`` that leaves as few delegates as the ops between them allow."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    partitioner = XnnpackPartitioner(configs=_configs())
    by_pairs = partitioner.generate_partitions

    def by_stages(exported: ExportedProgram) -> list[Partition]:
        drop_from_node(exported.graph)
        matched = partitioner.get_matched_nodes_from_configs(exported)
        groups = [_with_results(group) for group in matched if all(map(_fits, group))]
        found = _safe_stages(exported, groups)
        if found is None:
            joined: list[Partition] = by_pairs(exported)
            return joined
        return [Partition(id=index, nodes=nodes) for index, nodes in enumerate(found)]

    partitioner.generate_partitions = by_stages
    return partitioner


def _safe_stages(exported: ExportedProgram, groups: list[list[Node]]) -> list[list[Node]] | None:
    """Stages without the ops that XNNPACK would join with a table that it frees; None as `stages`."""
    why = _reporter()
    while True:
        found = stages(exported.graph, groups)
        unsafe = frozenset(node for nodes in found or () for node in beside_tables(nodes, exported))
        if not unsafe:
            return found
        for node in unsafe:
            why(node, BESIDE_TABLE)
        groups = list(parted(groups, unsafe))


def refuse_freed_tables(module: GraphModule) -> None:
    """Refuse delegates in which XNNPACK frees a table that it uses, where a partitioner of its own made them."""
    for node in module.graph.find_nodes(op="get_attr"):
        lowered = getattr(module, str(node.target))
        if getattr(lowered, "backend_id", None) != "XnnpackBackend":
            continue
        for unsafe in beside_tables_in(lowered.original_module):
            raise LoweringError(f"{where(unsafe)}: {BESIDE_TABLE}. Leave partitioners out: then a kernel runs this op")


def _configs() -> list[type[Any]]:
    """XNNPACK's own conditions, but for the quantized ops that it takes in more or fewer cases."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import (
        AddConfig,
        MeanDimConfig,
        MulConfig,
        SoftmaxConfig,
        SubConfig,
    )
    from executorch.backends.xnnpack.partition.config.node_configs import MaxDimConfig

    ours = {each: _with_clamps(each) for each in (AddConfig, MulConfig, SubConfig)}
    ours[MeanDimConfig] = _quantized_where_fixed(MeanDimConfig)
    ours[SoftmaxConfig] = _not_of_images(SoftmaxConfig)
    ours[MaxDimConfig] = _as_it_is_written(MaxDimConfig)
    return [ours.get(each, each) for each in ALL_PARTITIONER_CONFIGS]


def _with_clamps(config: Any) -> Any:
    """With the clamps behind a sum, a difference or a product, as the kernels have them.

    Its own condition has a sum and relu; other clamps make it compute in float, between a dequantize and a quantize.
    """

    class WithClamps(config):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.fused_acts = ["relu.default", "hardtanh.default"]

    return WithClamps


def _quantized_where_fixed(config: Any) -> Any:
    """A mean whose result has a size that varies is one of floats, between a dequantize and a quantize of the delegate.

    XNNPACK's quantized mean has an accumulator for each element of its result, and room for those of the first call:
    ``reshape_reduce_operator`` asks for more memory where the result grows beyond the bounds, and not where the
    accumulators do. A larger call writes behind them. The mean of float32 has none, and that of float16, which has some
    too, is left to a kernel.
    """
    why = _reporter()

    class QuantizedWhereFixed(config):  # type: ignore[misc]
        def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
            if _is_float16(node) and not fixed(*shape_of(node)):
                why(node, GROWING_FLOAT16)
                return False
            taken: bool = super().check_constraints(node, ep)
            return taken

        def get_node_and_deps(self, node: Node, ep: ExportedProgram) -> list[Node]:
            if not fixed(*shape_of(node)):
                return [node]
            matched: list[Node] = super().get_node_and_deps(node, ep)
            return matched

    return QuantizedWhereFixed


def _not_of_images(config: Any) -> Any:
    """A softmax of values that may have their channels last, where XNNPACK's is along those."""
    why = _reporter()

    class NotOfImages(config):  # type: ignore[misc]
        def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
            if of_images(node):
                why(node, SOFTMAX_OF_IMAGES)
                return False
            taken: bool = super().check_constraints(node, ep)
            return taken

    return NotOfImages


def _as_it_is_written(config: Any) -> Any:
    """A maximum along height or width that keeps the axis; of others ExecuTorch finds out when it is too late."""
    why = _reporter()

    class AsItIsWritten(config):  # type: ignore[misc]
        def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
            if len(node.args) != 3 or node.args[1] not in (2, 3) or node.args[2] is not True:
                why(node, OTHER_MAXIMUM)
                return False
            taken: bool = super().check_constraints(node, ep)
            return taken

    return AsItIsWritten


def refuse_growing_means(graph: Graph, partitioners: Sequence[Any]) -> None:
    """Refuse means that outgrow their accumulators, where a partitioner of XNNPACK's own would take them."""
    from executorch.backends.xnnpack.partition.config.generic_node_configs import MeanDimConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType

    configs: list[Any] = [getattr(each, "target_partitioner_configs", {}).get("mean.dim") for each in partitioners]
    precisions = {
        each for config in configs if type(config) is MeanDimConfig for each in config.enabled_precision_types
    }
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim):
        if fixed(*shape_of(node)):
            continue
        quantized = operand(node, 0).target in DEQUANTIZE and [user.target in QUANTIZE for user in node.users] == [True]
        if quantized and ConfigPrecisionType.STATIC_QUANT in precisions:
            what, instead = "quantized values", "the mean is one of floats"
        elif _is_float16(node) and ConfigPrecisionType.FP32 in precisions:
            what, instead = "float16", "a kernel runs the mean"
        else:
            continue
        raise LoweringError(
            f"{where(node)} averages {what}, and its result has a size that varies: XNNPACK's own partitioner makes a "
            "program of it that writes behind its memory when a call is larger than the first. Leave partitioners out: "
            f"then {instead}"
        )


def _is_float16(node: Node) -> bool:
    value = node_tensor(node)
    return value is not None and value.dtype is torch.float16


def _reporter() -> Any:
    """Says why a node is in no delegate, as the partitioner's own rules do."""
    from executorch.exir.backend.utils import WhyNoPartition

    return WhyNoPartition(logger=logging.getLogger("executorch.backends.xnnpack"))


def _fits(node: Node) -> bool:
    """Whether XNNPACK can hold what a node reads and makes; its partitioner does not ask."""
    tensors = (x for each in (node, *node.all_input_nodes) for x in pytree.tree_leaves(each.meta.get("val")))
    return all(not isinstance(x, Tensor) or x.dim() <= MOST_DIMENSIONS for x in tensors)


def is_xnnpack(partitioners: Sequence[Any]) -> bool:
    """Whether there are partitioners, and each delegates to XNNPACK: its legal form would take ops apart for others."""
    specs = [getattr(partitioner, "delegation_spec", None) for partitioner in partitioners]
    return bool(specs) and all(getattr(spec, "backend_id", None) == "XnnpackBackend" for spec in specs)


def _with_results(group: list[Node]) -> list[Node]:
    """A group with the nodes that pick the results of ops that return several."""
    picks = [user for node in group for user in node.users if user.target is operator.getitem]
    return list(dict.fromkeys([*group, *picks]))
