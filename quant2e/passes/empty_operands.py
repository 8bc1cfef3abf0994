"""Empty operands of a concatenation, such as a cache before the first step.

cat(…, empty, …)  =  cat(…, …)      and      cat(x, empty)  =  clone(x)

No range fits a tensor without values, so one such operand would keep the whole concatenation float.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.graph.data_movement import MOVEMENTS, Effect
from quant2e.graph.dataflow import operand
from quant2e.graph.effects import aten
from quant2e.graph.fake_values import node_tensor


def drop_empty_operands(gm: GraphModule) -> int:
    """A pass: concatenations of ``gm`` without the operands that are empty whatever the sizes; returns how many."""
    count = 0
    for node in gm.graph.nodes:
        movement, result = MOVEMENTS.get(node.target), node_tensor(node)
        if movement is None or movement.effect is not Effect.JOIN or result is None:
            continue
        tensors = list(operand(node, "tensors"))
        kept = [tensor for tensor in tensors if not _is_empty(tensor)]
        if not kept or len(kept) == len(tensors) or not all(_is_like(tensor, result) for tensor in kept):
            continue
        if len(kept) > 1:
            node.args = (kept, *node.args[1:])
        else:
            node.target, node.args, node.kwargs = aten.clone.default, (kept[0],), {}
        count += 1
    return count


def _is_like(node: Node, result: Tensor) -> bool:
    """Whether a tensor has the dtype and the number of dimensions of the result: some joins add dimensions."""
    value = node_tensor(node)
    return value is not None and value.dtype == result.dtype and value.dim() == result.dim()


def _is_empty(node: Node) -> bool:
    value = node_tensor(node)
    return value is not None and any(type(size) is int and size == 0 for size in value.shape)
