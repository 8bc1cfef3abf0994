"""Batches of one: an image without a batch dimension, as torch takes it too.

conv2d(x, w, b)  =  squeeze(conv2d(unsqueeze(x), w, b))      and what follows it with it: pools, activations, sums.

Backends know convolutions of batches. The ops between two such convolutions stay in the batch, so that they are fused
as they are elsewhere. A node keeps its name and its metadata; only its operand and its shape change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_behind
from quant2e.graph.fake_values import node_tensor, value_of_call

aten = torch.ops.aten

_CONVOLUTIONS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv_transpose1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    aten.conv_transpose2d.input: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
    aten.conv_transpose3d.input: 3,
}
"""Op → over how many dimensions."""
_POOLS: dict[Any, int] = {
    aten.max_pool1d.default: 1,
    aten.avg_pool1d.default: 1,
    aten.adaptive_avg_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.avg_pool2d.default: 2,
    aten.adaptive_avg_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.avg_pool3d.default: 3,
    aten.adaptive_avg_pool3d.default: 3,
}
_POINTWISE = frozenset(
    {
        aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default, aten.hardtanh.default,
        aten.hardtanh_.default, aten.clamp.default, aten.clamp_.default, aten.hardswish.default,
        aten.hardswish_.default, aten.silu.default, aten.silu_.default, aten.gelu.default, aten.sigmoid.default,
        aten.tanh.default, aten.leaky_relu.default, aten.leaky_relu_.default, aten.elu.default, aten.dropout.default,
        aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.mul.Tensor,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BatchesOfOne:
    """A pass: the convolutions without a batch that ``wanted`` answers True for, in batches of one."""

    wanted: Callable[[Node], bool]
    __name__: ClassVar[str] = "batches_of_one"

    def __call__(self, gm: GraphModule) -> int:
        """Rewrite every convolution, and what follows it; returns how many convolutions."""
        batched: dict[Node, Node] = {}
        count = 0
        for node in list(gm.graph.nodes):
            dimensions = _CONVOLUTIONS.get(node.target)
            if dimensions is not None and _is_single(node, dimensions) and self.wanted(node):
                x = operand(node, 0)
                _raise_operands(node, {x: batched.get(x) or emit(node, aten.unsqueeze.default, x, 0)})
                count += 1
            elif _continues(node, batched):
                _raise_operands(node, {x: batched[x] for x in node.all_input_nodes})
            else:
                continue
            batched[_lowered(node)] = node
        for squeezed in reversed(batched):
            if not squeezed.users:
                gm.graph.erase_node(squeezed)
        return count


def _is_single(node: Node, dimensions: int) -> bool:
    """Whether a convolution or pool over so many dimensions has an operand without a batch."""
    value = node_tensor(operand(node, 0))
    return value is not None and value.dim() == dimensions + 1


def _continues(node: Node, batched: Mapping[Node, Node]) -> bool:
    """Whether a node computes the same in a batch, on operands that are all there."""
    if not node.all_input_nodes or not all(x in batched for x in node.all_input_nodes):
        return False
    if node.target in _POOLS:
        return _is_single(node, _POOLS[node.target])
    ranks = {x.meta["val"].dim() for x in node.all_input_nodes}
    return node.target in _POINTWISE and len(ranks) == 1


def _raise_operands(node: Node, batched: Mapping[Node, Node]) -> None:
    """Let a node read operands in batches, and produce one."""
    for single, batch in batched.items():
        node.replace_input_with(single, batch)
    node.meta["val"] = value_of_call(node)


def _lowered(node: Node) -> Node:
    """What a node in a batch produces, without the batch: what everybody else reads."""
    squeezed = emit_behind(node, node, aten.squeeze.dim, 0)
    node.replace_all_uses_with(squeezed, delete_user_cb=lambda user: user is not squeezed)
    return squeezed
