"""Empty operands of a concatenation, such as a cache before the first step.

cat(…, empty, …)  =  cat(…, …)      and      cat(x, empty)  =  clone(x)

No range fits a tensor without values, so one such operand would keep the whole concatenation float.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quant2e.graph.dataflow import operand
from quant2e.graph.effects import aten
from quant2e.graph.fake_values import node_tensor

_JOINS = frozenset({aten.cat.default, aten.concat.default, aten.concatenate.default})


def drop_empty_operands(gm: GraphModule) -> int:
    """A pass: concatenations of ``gm`` without the operands that are empty whatever the sizes; returns how many."""
    count = 0
    for node in gm.graph.nodes:
        if node.target not in _JOINS or (result := node_tensor(node)) is None:
            continue
        tensors = list(operand(node, "tensors"))
        kept = [tensor for tensor in tensors if not _is_empty(tensor)]
        same_dtype = all(getattr(node_tensor(tensor), "dtype", None) == result.dtype for tensor in kept)
        if not kept or len(kept) == len(tensors) or not same_dtype:
            continue
        if len(kept) > 1:
            node.args = (kept, *node.args[1:])
        else:
            node.target, node.args, node.kwargs = aten.clone.default, (kept[0],), {}
        count += 1
    return count


def _is_empty(node: Node) -> bool:
    value = node_tensor(node)
    return value is not None and any(type(size) is int and size == 0 for size in value.shape)
