"""Constants without dimensions that control flow takes, a counter that begins at zero say.

    while_loop(p, f, [c, x], [])  =  while_loop(p, f, [c + sum(x[:0]), x], [])        x: an input

Inductor makes a number of such a constant, and can hand only tensors to a body.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.inductor.rewrites.graph import call
from quant2e.graph.constants import Constants
from quant2e.graph.control_flow import control_flow
from quant2e.graph.effects import aten
from quant2e.graph.fake_values import node_tensor


def constants_as_operands(gm: GraphModule) -> int:
    """A pass: let constants without dimensions that control flow takes depend on an input; returns how many did."""
    flows = [node for node in gm.graph.nodes if control_flow(node) is not None]
    source = next((node for node in gm.graph.nodes if node.op == "placeholder" and _has_rows(node)), None)
    if not flows or source is None:
        return 0
    constants, made = Constants(gm.graph), dict[Node, Node]()
    for node in flows:
        for operand in node.all_input_nodes:
            value = node_tensor(operand)
            if operand not in constants or value is None or value.dim():
                continue
            if operand not in made:
                with gm.graph.inserting_before(node):
                    nothing = call(gm, node, aten.slice.Tensor, source, 0, 0, 0)
                    zero = call(gm, node, aten.sum.default, nothing, dtype=value.dtype)
                    made[operand] = call(gm, node, aten.add.Tensor, operand, zero)
            node.replace_input_with(operand, made[operand])
    return len(made)


def _has_rows(node: Node) -> bool:
    value = node_tensor(node)
    return isinstance(value, Tensor) and value.dim() > 0
