"""XNNPACK's partitioner, which says what it takes, with our rule for what goes together.

Its own rule tries to join each pair of partitions once, in the order of the graph, which leaves a model whose blocks
share a chain or a mask in pieces, and takes time that grows with the square of their number.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.passes.infra.partitioner import Partition
from torch.utils import _pytree as pytree

from lowering.executorch.xnnpack.legalize.requirements import MOST_DIMENSIONS
from lowering.executorch.xnnpack.stages import stages
from lowering.export import drop_from_node


def xnnpack_partitioner() -> Any:
    """A partitioner for ``to_edge_transform_and_lower`` that leaves as few delegates as the ops between them allow."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    partitioner = XnnpackPartitioner(configs=_configs())
    by_pairs = partitioner.generate_partitions

    def by_stages(exported: ExportedProgram) -> list[Partition]:
        drop_from_node(exported.graph)
        matched = partitioner.get_matched_nodes_from_configs(exported)
        groups = [_with_results(group) for group in matched if all(map(_fits, group))]
        found = stages(exported.graph, groups)
        if found is None:
            joined: list[Partition] = by_pairs(exported)
            return joined
        return [Partition(id=index, nodes=nodes) for index, nodes in enumerate(found)]

    partitioner.generate_partitions = by_stages
    return partitioner


def _configs() -> list[type[Any]]:
    """XNNPACK's own conditions; sums, differences and products take the clamps behind them along, as its kernels do.

    Its own do so for a sum and relu; other clamps make it compute in float, between a dequantize and a quantize.
    """
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import AddConfig, MulConfig, SubConfig

    return [
        _with_clamps(each) if each in (AddConfig, MulConfig, SubConfig) else each for each in ALL_PARTITIONER_CONFIGS
    ]


def _with_clamps(config: Any) -> Any:
    class WithClamps(config):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.fused_acts = ["relu.default", "hardtanh.default"]

    return WithClamps


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
