"""Q/DQ form for ONNX runtimes: what they recognise, with every dequantized value the same.

    q(x): s8 → dq                    =  q(x): u8, zero point + 128 → dq                  (onnxruntime)
    input: s8 → dq                   =  input: s8 → dq → q: u8 → dq, and so for outputs  (onnxruntime)
    linear(x, dq(w), b)              =  x @ dq(wᵀ) + b                                   for x that Gemm does not take
    product(dq(x), dq(w), b)         =  product(dq(x), dq(w), dq(round(b / s_x·s_w)))

The last rounds a bias to units of the accumulator, so it moves by half a unit at most. onnxruntime's kernels take u8
activations and s8 weights, per output channel, with an int32 bias in those units; TensorRT takes s8 with zero points
of 0, and a float bias. Weights of four bits are marked by the name of their buffer, because torch has no such dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.rewrites.average_pools import plain_average_pools
from lowering.rewrites.embedding import gather_then_dequantize
from lowering.rewrites.experts import product_of_every_expert
from lowering.rewrites.layouts import PLAIN_LAYOUTS
from lowering.rewrites.moves import is_move, quantized_before_moves
from lowering.rewrites.ranges import plain_byte_ranges
from quant2e.errors import LoweringError, where
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import literal, operand, operands, set_operand
from quant2e.graph.edit import emit, emit_constant, emit_read, insert_call, replace
from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE, qd
from quant2e.passes import Pass, run
from quant2e.passes.dead_code import prune_unused_attributes, remove_dead_code

aten = torch.ops.aten

INT4 = "_int4"
"""Suffix of buffers that hold integers of four bits."""

_PRODUCTS = (
    aten.linear.default,
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.convolution.default,
)
_SCORES = frozenset({aten.matmul.default, aten.bmm.default, aten.scaled_dot_product_attention.default})
_ACCUMULATOR_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Convention:
    """What a runtime's integer kernels take.

    ``unsigned``: activations are u8. ``unsigned_weights``: a weight that is read twice is u8. ``symmetric``: every zero
    point is 0. ``integer_bias``: a bias is int32, in units of the accumulator. ``run_time_ops``: there are kernels for
    ranges found at run time; without them they are float arithmetic. ``signed_scores``: queries and keys whose zero
    point is 0 stay s8, and are quantized where their layers write them.
    """

    name: str
    unsigned: bool
    symmetric: bool
    integer_bias: bool
    unsigned_weights: bool = False
    run_time_ops: bool = True
    signed_scores: bool = False


CONVENTIONS = {
    "onnxruntime": Convention(
        name="onnxruntime", unsigned=True, symmetric=False, integer_bias=True, unsigned_weights=True
    ),
    "tensorrt": Convention(name="tensorrt", unsigned=False, symmetric=True, integer_bias=False),
}
"""By the name that `to_onnx` takes as its target."""

OPENVINO = Convention(
    name="openvino", unsigned=True, symmetric=False, integer_bias=False, run_time_ops=False, signed_scores=True
)
"""What OpenVINO makes kernels on u8 and s8 of; it adds biases in float, and scores are of s8 by s8."""


def in_form(module: GraphModule, convention: Convention) -> None:
    """Rewrite the graph in place. Raises `LoweringError` for what the convention cannot hold, before anything else."""
    if convention.symmetric:
        _check_symmetric(module)
    run(module, form_of(convention))


def form_of(convention: Convention) -> tuple[Pass, ...]:
    """The pipeline of a convention."""
    scores = (quantized_before_moves, unsigned_besides_scores) if convention.signed_scores else (unsigned_quantization,)
    unsigned = (*scores, unsigned_inputs_and_outputs) if convention.unsigned else ()
    products = integer_products if convention.integer_bias else linear_to_matmul
    plain = (*PLAIN_LAYOUTS, plain_average_pools)
    ranges = (plain_byte_ranges,) if convention.unsigned else ()
    experts_and_lookups = (product_of_every_expert, gather_then_dequantize)
    cleaned = (plain_constants, remove_dead_code, prune_unused_attributes)
    return (*plain, *experts_and_lookups, *unsigned, *ranges, products, *cleaned)


def _check_symmetric(module: GraphModule) -> None:
    """TensorRT: int8, zero points of 0, parameters known in advance."""
    wrong = []
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in QUANTIZE | DEQUANTIZE | CHOOSE_QPARAMS:
            continue
        if node.target in CHOOSE_QPARAMS:
            wrong.append(f"{where(node)}: parameters found at run time")
            continue
        zero = operand(node, 2)
        zeros = tensor_at(module, zero)
        if (isinstance(zero, int) and zero != 0) or (zeros is not None and bool(zeros.any())):
            wrong.append(f"{where(node)}: a zero point that is not 0")
        elif operand(node, "dtype") is torch.uint8:
            wrong.append(f"{where(node)}: uint8")
    if wrong:
        raise LoweringError(
            "TensorRT takes int8 with zero points of 0 and static parameters only: "
            + "; ".join(wrong[:5])
            + f"; … {len(wrong) - 5} more" * (len(wrong) > 5)
            + ". Quantize with symmetric activations, for instance recipe('w8a8', activation={'symmetric': True})"
        )


def unsigned_quantization(module: GraphModule) -> int:
    """Move s8 activations to u8 wherever nothing but dequantize ops sees the integers; returns how many."""
    return _unsigned(module, lambda _: False)


def unsigned_besides_scores(module: GraphModule) -> int:
    """The same, besides the symmetric operands of products of two activations."""
    return _unsigned(module, _in_scores)


def _in_scores(quantize: Node) -> bool:
    """Whether nothing but products of two activations reads symmetric integers, perhaps behind moves."""
    readers = [reader for dequantized in quantize.users for reader in dequantized.users]
    while readers:
        reader = readers.pop()
        if is_move(reader):
            readers += reader.users
        elif reader.target not in _SCORES or any(_is_constant(value) for value in reader.all_input_nodes[:2]):
            return False
    return bool(operand(quantize, "zero_point") == 0)


def _is_constant(value: Node) -> bool:
    integers = operand(value, "input") if value.target in DEQUANTIZE else value
    return isinstance(integers, Node) and integers.op == "get_attr"


def _unsigned(module: GraphModule, kept: Callable[[Node], bool]) -> int:
    count = 0
    for node in module.graph.nodes:
        if operand(node, "dtype") is not torch.int8:
            continue
        readers = list(node.users)
        if node.target is qd.quantize_per_tensor.default and _all(readers, qd.dequantize_per_tensor.default):
            if kept(node):
                continue
            for each in (node, *readers):
                _move_to_unsigned(each)
            count += 1
        elif node.target is qd.choose_qparams.tensor:
            count += _unsigned_dynamic(node)
    return count


def _unsigned_dynamic(choose: Node) -> bool:
    """The same for parameters found at run time: the zero point moves with the range."""
    quantizes = {user for part in choose.users for user in part.users}
    known = (qd.quantize_per_tensor.tensor, qd.dequantize_per_tensor.tensor)
    if not all(node.target in known for node in quantizes):
        return False
    if any(not _all(list(n.users), known[1]) for n in quantizes if n.target is known[0]):
        return False
    for node in (choose, *quantizes):
        _move_to_unsigned(node)
    return True


def _all(nodes: list[Node], target: Any) -> bool:
    return bool(nodes) and all(node.target is target for node in nodes)


def _move_to_unsigned(node: Node) -> None:
    """The same steps in u8: the bounds, and a zero point that is a number, move up by 128."""
    for name in ("zero_point", "quant_min", "quant_max"):
        if isinstance(number := operand(node, name), int):
            set_operand(node, name, number + 128)
    set_operand(node, "dtype", torch.uint8)
    if node.target in QUANTIZE:
        node.meta["val"] = node.meta["val"].to(torch.uint8)


def unsigned_inputs_and_outputs(module: GraphModule) -> int:
    """Let ops behind an s8 input and before an s8 output compute on u8: a kernel takes and gives one dtype."""
    count = 0
    for node in list(module.graph.nodes):
        if operand(node, "dtype") is not torch.int8:
            continue
        if node.target is qd.dequantize_per_tensor.default and operand(node, "input").op == "placeholder":
            readers = list(node.users)
            moved = _through_unsigned(node.next, node, node)
            for reader in readers:
                reader.replace_input_with(node, moved)
            count += 1
        if node.target is qd.quantize_per_tensor.default and any(user.op == "output" for user in node.users):
            set_operand(node, "input", _through_unsigned(node, operand(node, "input"), node))
            count += 1
    return count


def _through_unsigned(place: Node, value: Node, like: Node) -> Node:
    """``value`` quantized and dequantized right before ``place``, in u8 with the steps of ``like``, its origin."""
    scale, zero, low, high = (operand(like, name) for name in ("scale", "zero_point", "quant_min", "quant_max"))
    grid = (scale, zero + 128, low + 128, high + 128, torch.uint8)
    known = value.meta["val"]
    quantized = insert_call(
        place, qd.quantize_per_tensor.default, (value, *grid), value=known.to(torch.uint8), origin=like
    )
    return insert_call(place, qd.dequantize_per_tensor.default, (quantized, *grid), value=known, origin=like)


def integer_products(module: GraphModule) -> int:
    """Store biases as int32, and write linears as `linear_to_matmul` does.

    In one walk: the constants of a layer then lie next to each other in the file.
    """
    transposed: dict[str, str] = {}
    count = 0
    for node in list(module.graph.nodes):
        count += _integer_bias(module, node)
        count += _as_matmul(module, node, transposed)
    return count


def linear_to_matmul(module: GraphModule) -> int:
    """Write linears as products with the transposed weight, where Gemm, or QGemm, does not take their input."""
    transposed: dict[str, str] = {}
    return sum(_as_matmul(module, node, transposed) for node in list(module.graph.nodes))


def _integer_bias(module: GraphModule, node: Node) -> bool:
    """A bias in units of the accumulator, where input and weight have static scales."""
    if node.target not in _PRODUCTS:
        return False
    x, bias = operand(node, "input"), tensor_at(module, operand(node, "bias"))
    if bias is None or x.target is not qd.dequantize_per_tensor.default:
        return False
    scale = _weight_scale(module, operand(node, "weight"))
    if scale is None or operand(node, "transposed"):
        return False
    unit = (scale.double() * float(operand(x, "scale"))).expand(bias.shape[0])
    integers = (bias.detach().double() / unit).round()
    if not bool(unit.all()) or float(integers.abs().max()) > _ACCUMULATOR_MAX:
        return False  # a bias that the accumulator cannot hold stays float
    stored = emit_constant(module, node, "bias_int32", integers.to(torch.int32))
    scales = emit_constant(module, node, "bias_scale", unit.to(torch.float32))
    bounds = (-_ACCUMULATOR_MAX - 1, _ACCUMULATOR_MAX)
    value = emit(node, qd.dequantize_per_channel.default, stored, scales, None, 0, *bounds, torch.int32)
    set_operand(node, "bias", value)
    return True


def _weight_scale(module: GraphModule, weight: Node) -> Tensor | None:
    """Scale per output channel (axis 0), or of the tensor, of a dequantized constant; None for anything else."""
    if tensor_at(module, operand(weight, "input")) is None:
        return None
    if weight.target is qd.dequantize_per_tensor.default:
        return torch.tensor(float(operand(weight, "scale")))
    if weight.target is qd.dequantize_per_channel.default and operand(weight, "axis") == 0:
        return tensor_at(module, operand(weight, "scales"))
    return None


def _wants_matmul(x: Node) -> bool:
    """More than two dimensions, which Gemm does not take, or parameters found at run time, which QGemm does not."""
    return bool(x.meta["val"].dim() > 2) or x.target is qd.dequantize_per_tensor.tensor


def _as_matmul(module: GraphModule, node: Node, transposed: dict[str, str]) -> bool:
    """A linear as a product; ``transposed``: path of each transposed weight that exists, by the name of the weight."""
    if node.target is not aten.linear.default or not _wants_matmul(operand(node, "input")):
        return False
    weight, bias = operand(node, "weight"), operand(node, "bias")
    integers = operand(weight, "input")
    values, axis = tensor_at(module, integers), operand(weight, "axis")
    per_channel = weight.target is qd.dequantize_per_channel.default and axis in (0, 1)
    if values is None or not (per_channel or weight.target is qd.dequantize_per_tensor.default):
        return False
    name = _name(integers)
    if name in transposed:
        stored = emit_read(module, node, transposed[name])
    else:
        stored = emit_constant(module, node, name, values.t().contiguous())
        transposed[name] = str(stored.target)
    known = weight.meta["val"].t().contiguous()
    dequantized = insert_call(node, weight.target, weight.args, weight.kwargs, value=known)
    set_operand(dequantized, "input", stored)
    if per_channel:
        set_operand(dequantized, "axis", 1 - axis)
    product = emit(node, aten.matmul.default, operand(node, "input"), dequantized)
    replace(node, product if bias is None else emit(node, aten.add.Tensor, product, bias))
    return True


def _name(node: Node) -> str:
    return str(node.target).replace(".", "_")


def plain_constants(module: GraphModule) -> int:
    """Zero points in the dtype of the integers; constants of four bits under a name that says so."""
    return sum(_plain_constants(module, node) for node in list(module.graph.nodes) if node.target in DEQUANTIZE)


def _plain_constants(module: GraphModule, node: Node) -> bool:
    before, integers = operands(node), operand(node, "input")
    stored = tensor_at(module, integers)
    if stored is None:
        return False
    for name in ("zero_point", "zero_points"):
        zeros = tensor_at(module, zero := operand(node, name))
        if zeros is not None and not zeros.is_floating_point() and zeros.dtype is not stored.dtype:
            set_operand(node, name, emit_constant(module, node, _name(zero), zeros.to(stored.dtype)))
    low, high = literal(node, "quant_min"), literal(node, "quant_max")
    fits = stored.dtype is torch.int8 and low >= -8 and high <= 7
    if fits and stored.dim() > 1 and not _name(integers).endswith(INT4):
        set_operand(node, "input", emit_constant(module, node, f"{_name(integers)}{INT4}", stored))
    return operands(node) != before
