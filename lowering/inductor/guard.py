"""Guards against wrong int8 kernels: each case becomes float arithmetic, which no pattern matches.

    op(dq(x), …)        =>        op((x - zero_point) * scale, …)

The kernels take no weight with zero points, or with scales along its inputs, and may saturate on CPUs without VNNI.
Inductor's patterns (torch 2.13 has some for products, and torchao adds its own) look at the shape of the graph and not
at all that must hold: they take a transposed convolution for a plain one, and pool integers of one scale into integers
of another. Inductor fuses the arithmetic into its neighbours, so an op that is guarded costs what a float op costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.inductor.kernels.transposed import TransposedConvolution, is_transposed
from lowering.inductor.rewrites.graph import call
from lowering.inductor.rewrites.kernel_calls import not_called
from lowering.inductor.rewrites.pipeline import MOVES
from lowering.inductor.rewrites.weights import ACTIVATION_DQ, CONVOLUTION, activation_of, weight_of
from quant2e.cpu import detect, may_overflow
from quant2e.graph.attributes import tensor_at
from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.dataflow import operand, operands
from quant2e.graph.edit import take_over
from quant2e.graph.qdq_ops import DEQUANTIZE, qd
from quant2e.passes import run

aten = torch.ops.aten

_CARRY = MOVES | movements(Effect.JOIN) | {aten.max_pool2d.default}


def arithmetic(gm: GraphModule, user: Node, dequantized: Node) -> None:
    """Let ``user`` read ``(x.float() - zero_point) * scale`` instead of the dequantize node it reads now.

    The operations and their order are those of the eager kernel, so the result is bit-equal.
    """
    args = operands(dequantized)
    out = args["out_dtype"] or torch.float32
    scale, point = args["scale"], args["zero_point"]
    with gm.graph.inserting_before(user):
        if isinstance(scale, Node):
            scale = call(gm, dequantized, aten.to.dtype, scale, out)
        if isinstance(point, Node):
            point = call(gm, dequantized, aten.to.dtype, point, out)
        found = call(gm, dequantized, aten.to.dtype, args["input"], out)
        if isinstance(point, Node) or point != 0:
            found = call(gm, dequantized, aten.sub.Tensor, found, point)
        found = call(gm, dequantized, aten.mul.Tensor, found, scale)
    take_over(found, dequantized)
    user.replace_input_with(dequantized, found)
    if not dequantized.users:
        gm.graph.erase_node(dequantized)


def dequantize_behind(node: Node | None) -> Node | None:
    """The dequantize node that a weight or activation comes from, through a dtype conversion, transposes and views."""
    passed = (aten.to.dtype, *MOVES)
    while isinstance(node, Node) and node.target in passed and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def quantized_operands(node: Node) -> tuple[Node, Node] | None:
    """The dequantize nodes of weight and activation of a quantized convolution or matrix product; None for others."""
    weight, activation = dequantize_behind(weight_of(node)), dequantize_behind(activation_of(node))
    if weight is None or activation is None or weight.target is not qd.dequantize_per_channel.default:
        return None
    return (weight, activation) if activation.target in ACTIVATION_DQ else None


def is_weight_only(gm: GraphModule, node: Node) -> bool:
    """Whether a convolution or matrix product has an integer weight, and an activation that is float."""
    weight, activation = dequantize_behind(weight_of(node)), dequantize_behind(activation_of(node))
    if weight is None or weight.target not in DEQUANTIZE or tensor_at(gm, weight.args[0]) is None:
        return False
    return activation is None or activation.target not in DEQUANTIZE


def refusal(gm: GraphModule, node: Node) -> str | None:
    """Why a convolution or matrix product must not become an int8 kernel; None when it may, or is not quantized."""
    found = quantized_operands(node)
    if found is None:
        return None
    weight, activation = found
    args, value, points = operands(weight), tensor_at(gm, weight.args[0]), tensor_at(gm, weight.args[2])
    if value is None or points is None or tensor_at(gm, weight.args[1]) is None:
        return "the weight is not a constant"
    if value.dtype is not torch.int8:
        return f"int8 kernels take int8 weights, not {value.dtype}"
    transposed = is_transposed(node)
    if args["axis"] != int(transposed):
        return (
            f"int8 kernels take one weight scale per output channel, and this weight has them along axis {args['axis']}"
        )
    if bool((points != 0).any()):
        return "int8 kernels take symmetric weights, and this one has zero points other than 0"
    if operands(activation)["dtype"] not in (torch.uint8, torch.int8):
        return f"int8 kernels take 8-bit activations, not {operands(activation)['dtype']}"
    if _is_of_one_channel(node, value) and _varies(gm):
        return (
            "Inductor describes the result of an int8 convolution over one channel wrongly where a size varies: its "
            "memory is laid out in channels last"
        )
    if transposed:
        value = TransposedConvolution.of(node, tuple(value.shape)).plain_weight(value)
    depthwise = node.target in CONVOLUTION and value.shape[1] == 1  # its kernels add in 32 bits
    if detect().saturates and not depthwise and may_overflow(value, operands(activation)["quant_max"]):
        return (
            "int8 kernels may saturate on this CPU, which has no VNNI, with activations and weights this large: "
            "quantize with reduce_range=True"
        )
    return not_called(node)


def _is_of_one_channel(node: Node, weight: Tensor) -> bool:
    """Whether a convolution reads one channel: such an image is contiguous and in channels last at the same time."""
    if node.target not in CONVOLUTION:
        return False
    return (weight.shape[0] if is_transposed(node) else weight.shape[1] * operand(node, "groups", 1)) == 1


def _varies(gm: GraphModule) -> bool:
    """Whether a size of an input varies."""
    values = (node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder")
    return any(isinstance(value, Tensor) and not all(type(s) is int for s in value.shape) for value in values)


def _requantizes(node: Node) -> list[Node]:
    """Dequantize nodes that a quantize node reads through ops which only move numbers or pick the largest."""
    found: list[Node] = []
    queue, seen = [node.args[0]], set()
    moved = False
    while queue:
        value = queue.pop()
        if not isinstance(value, Node) or value in seen:
            continue
        seen.add(value)
        if value.target in _CARRY:
            moved = True
            operand = value.args[0]
            queue.extend(operand if isinstance(operand, list | tuple) else [operand])
        elif value.target is qd.dequantize_per_tensor.default:
            found.append(value)
    return found if moved else []


@dataclass(frozen=True, slots=True)
class FloatProducts:
    """``op(dq(x), w)`` => ``op((x - zero_point) * scale, w)`` for the products that were refused. A pass."""

    products: tuple[Node, ...]

    @property
    def __name__(self) -> str:
        return "float_products"

    def __call__(self, gm: GraphModule) -> int:
        """Returns how often a dequantize gave way to arithmetic."""
        count = 0
        for product in self.products:
            activation = dequantize_behind(activation_of(product))
            if activation is None or activation.target not in ACTIVATION_DQ:
                continue  # what carries it here carried it to a product before this one as well
            for user in list(activation.users):
                if _reaches(user, product):
                    arithmetic(gm, user, activation)
                    count += 1
        return count


def keep_from_patterns(gm: GraphModule) -> dict[str, str]:
    """Guard every case above. Returns, by node name, why that op does not become an int8 kernel."""
    refused = {node: reason for node in gm.graph.nodes if (reason := refusal(gm, node)) is not None}
    run(gm, (FloatProducts(tuple(refused)), guard_moves), compiled=False)
    return {node.name: reason for node, reason in refused.items()}


def guard_moves(gm: GraphModule) -> int:
    """Dequantize by arithmetic what is moved, or pooled, from one scale to another; returns how often."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is not qd.quantize_per_tensor.default:
            continue
        wanted = tuple(node.args[1:])
        for source in _requantizes(node):
            if tuple(source.args[1:]) != wanted:
                for user in list(source.users):
                    if _reaches(user, node):
                        arithmetic(gm, user, source)
                        count += 1
    return count


def _reaches(node: Node, goal: Node) -> bool:
    """Whether ``goal`` is ``node``, or reads it through conversions, transposes and moves."""
    return node is goal or (
        node.target in (aten.to.dtype, *_CARRY) and any(_reaches(user, goal) for user in node.users)
    )
