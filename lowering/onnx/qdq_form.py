"""Q/DQ form for ONNX runtimes: what they recognise, with every dequantized value the same.

    q(x): s8 → dq                    =  q(x): u8, zero point + 128 → dq                  (onnxruntime)
    input: s8 → dq                   =  input: s8 → dq → q: u8 → dq, and so for outputs  (onnxruntime)
    linear(x, dq(w), b)              =  x @ dq(wᵀ) + b                                   for x that Gemm does not take
    product(dq(x), dq(w), b)         =  product(dq(x), dq(w), dq(round(b / s_x·s_w)))    up to half a unit of the
    accumulator

onnxruntime's kernels take u8 activations and s8 weights, per output channel, with an int32 bias in units of the
accumulator; TensorRT takes s8 with zero points of 0, and a float bias. Weights of four bits are marked by the name of
their buffer, because torch has no such dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.rewrites.embedding import gather_then_dequantize
from quant2e.errors import LoweringError, where
from quant2e.graph.attributes import tensor_at
from quant2e.graph.edit import emit, emit_constant
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
_ACCUMULATOR_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Convention:
    """What a runtime's integer kernels take.

    ``unsigned``: activations are u8. ``symmetric``: every zero point is 0. ``integer_bias``: a bias is int32, in units
    of the accumulator.
    """

    name: str
    unsigned: bool
    symmetric: bool
    integer_bias: bool


CONVENTIONS = {
    "onnxruntime": Convention(name="onnxruntime", unsigned=True, symmetric=False, integer_bias=True),
    "tensorrt": Convention(name="tensorrt", unsigned=False, symmetric=True, integer_bias=False),
}


def in_form(module: GraphModule, convention: Convention) -> None:
    """Rewrite the graph in place. Raises `LoweringError` for what the convention cannot hold, before anything else."""
    if convention.symmetric:
        _check_symmetric(module)
    run(module, form_of(convention))


def form_of(convention: Convention) -> tuple[Pass, ...]:
    """The pipeline of a convention."""

    def products(module: GraphModule) -> int:
        turned: dict[str, str] = {}
        count = 0
        for node in list(module.graph.nodes):
            if node.target in _PRODUCTS and convention.integer_bias:
                count += _integer_bias(module, node)
            if node.target is aten.linear.default and _wants_matmul(_args(node)[0]):
                count += _as_matmul(module, node, turned)
        return count

    unsigned = (unsigned_activations, unsigned_boundary) if convention.unsigned else ()
    return (
        gather_then_dequantize, *unsigned, products, plain_constants, remove_dead_code, prune_unused_attributes,
    )  # fmt: skip


def _check_symmetric(module: GraphModule) -> None:
    """TensorRT: int8, zero points of 0, parameters known in advance."""
    wrong = []
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in QUANTIZE | DEQUANTIZE | CHOOSE_QPARAMS:
            continue
        if node.target in CHOOSE_QPARAMS:
            wrong.append(f"{where(node)}: parameters found at run time")
            continue
        zero = _args(node)[2]
        zeros = tensor_at(module, zero)
        if (isinstance(zero, int) and zero != 0) or (zeros is not None and bool(zeros.any())):
            wrong.append(f"{where(node)}: a zero point that is not 0")
        elif torch.uint8 in _args(node):
            wrong.append(f"{where(node)}: uint8")
    if wrong:
        raise LoweringError(
            "TensorRT takes int8 with zero points of 0 and static parameters only: "
            + "; ".join(wrong[:5])
            + f"; … {len(wrong) - 5} more" * (len(wrong) > 5)
            + ". Quantize with symmetric activations, for instance recipe('w8a8', activation={'symmetric': True})"
        )


def unsigned_activations(module: GraphModule) -> int:
    """Move s8 activations to u8 wherever nothing but dequantize ops sees the integers; returns how many."""
    count = 0
    for node in module.graph.nodes:
        if node.op != "call_function" or torch.int8 not in _args(node):
            continue
        readers = list(node.users)
        if node.target is qd.quantize_per_tensor.default and _all(readers, qd.dequantize_per_tensor.default):
            for each in (node, *readers):
                low, high = int(_args(each)[3]) + 128, int(_args(each)[4]) + 128
                each.args = (*_args(each)[:2], int(_args(each)[2]) + 128, low, high, torch.uint8)
            node.meta["val"] = node.meta["val"].to(torch.uint8)
            count += 1
        elif node.target is qd.choose_qparams.tensor:
            count += _unsigned_dynamic(node)
    return count


def unsigned_boundary(module: GraphModule) -> int:
    """Let ops behind an s8 input and before an s8 output compute on u8: a kernel takes and gives one dtype."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or torch.int8 not in _args(node):
            continue
        if node.target is qd.dequantize_per_tensor.default and _args(node)[0].op == "placeholder":
            readers = list(node.users)
            moved = _through_unsigned(module, node, _args(node)[1:], after=True)
            for reader in readers:
                reader.replace_input_with(node, moved)
            count += 1
        if node.target is qd.quantize_per_tensor.default and any(user.op == "output" for user in node.users):
            node.update_arg(0, _through_unsigned(module, node, _args(node)[1:], after=False))
            count += 1
    return count


def _through_unsigned(module: GraphModule, node: Node, grid: Any, *, after: bool) -> Node:
    """Quantize and dequantize with the same steps as ``grid``, in u8:
    what ``node`` gives (``after``), or what it reads.
    """
    scale, zero, low, high, _ = grid[:5]
    moved = (scale, zero + 128, low + 128, high + 128, torch.uint8)
    value = node if after else _args(node)[0]
    place = node.next if after else node
    with module.graph.inserting_before(place):
        quantized = module.graph.call_function(qd.quantize_per_tensor.default, (value, *moved))
        found = module.graph.call_function(qd.dequantize_per_tensor.default, (quantized, *moved))
    quantized.meta["val"], found.meta["val"] = value.meta["val"].to(torch.uint8), value.meta["val"]
    return found


def _all(nodes: list[Node], target: Any) -> bool:
    return bool(nodes) and all(node.target is target for node in nodes)


def _unsigned_dynamic(choose: Node) -> bool:
    """The same for parameters found at run time: the zero point moves with the range."""
    quantizes = {user for part in choose.users for user in part.users}
    known = (qd.quantize_per_tensor.tensor, qd.dequantize_per_tensor.tensor)
    if not all(node.target in known for node in quantizes):
        return False
    if any(not _all(list(n.users), known[1]) for n in quantizes if n.target is known[0]):
        return False
    x, low, high, eps, _ = _args(choose)
    choose.args = (x, int(low) + 128, int(high) + 128, eps, torch.uint8)
    for node in quantizes:
        node.args = (*_args(node)[:3], int(_args(node)[3]) + 128, int(_args(node)[4]) + 128, torch.uint8)
        if node.target is known[0]:
            node.meta["val"] = node.meta["val"].to(torch.uint8)
    return True


def _integer_bias(module: GraphModule, node: Node) -> bool:
    """A float bias as int32 in units of the accumulator, where input and weight have static, symmetric-enough
    scales.
    """
    x, weight = _args(node)[:2]
    bias = tensor_at(module, _args(node)[2] if len(_args(node)) > 2 else None)
    if bias is None or not isinstance(x, Node) or not isinstance(weight, Node):
        return False
    if x.target is not qd.dequantize_per_tensor.default or (scale := _weight_scale(module, weight)) is None:
        return False
    if node.target is aten.convolution.default and _args(node)[6]:
        return False
    unit = (scale.double() * float(_args(x)[1])).expand(bias.shape[0])
    integers = (bias.detach().double() / unit).round()
    if not bool(unit.all()) or float(integers.abs().max()) > _ACCUMULATOR_MAX:
        return False  # a bias that the accumulator cannot hold stays float
    stored = emit_constant(module, node, "bias_int32", integers.to(torch.int32))
    scales = emit_constant(module, node, "bias_scale", unit.to(torch.float32))
    bounds = (-_ACCUMULATOR_MAX - 1, _ACCUMULATOR_MAX)
    value = emit(node, qd.dequantize_per_channel.default, stored, scales, None, 0, *bounds, torch.int32)
    node.update_arg(2, value)
    return True


def _weight_scale(module: GraphModule, weight: Node) -> Tensor | None:
    """Scale per output channel (axis 0), or of the tensor, of a dequantized constant; None for anything else."""
    if not _args(weight) or tensor_at(module, _args(weight)[0]) is None:
        return None
    if weight.target is qd.dequantize_per_tensor.default:
        return torch.tensor(float(_args(weight)[1]))
    if weight.target is qd.dequantize_per_channel.default and _args(weight)[3] == 0:
        return tensor_at(module, _args(weight)[1])
    return None


def _wants_matmul(x: Node) -> bool:
    """More than two dimensions, which Gemm does not take, or parameters found at run time, which QGemm does not
    take.
    """
    return bool(x.meta["val"].dim() > 2) or x.target is qd.dequantize_per_tensor.tensor


def _as_matmul(module: GraphModule, node: Node, turned: dict[str, str]) -> bool:
    """A linear as a product with the transposed weight, which stays a constant;
    ``turned``: those that exist already.
    """
    weight = _args(node)[1]
    if (
        not isinstance(weight, Node)
        or (values := tensor_at(module, _args(weight)[0] if _args(weight) else None)) is None
    ):
        return False
    rest = _args(weight)[1:]
    if weight.target is qd.dequantize_per_channel.default and rest[2] in (0, 1):
        rest = (*rest[:2], 1 - rest[2], *rest[3:])
    elif weight.target is not qd.dequantize_per_tensor.default:
        return False
    name = _name(_args(weight)[0])
    if name in turned:
        with node.graph.inserting_before(node):
            stored = node.graph.get_attr(turned[name])
        stored.meta["val"] = _args(weight)[0].meta["val"].t()
    else:
        stored = emit_constant(module, node, name, values.t().contiguous())
        turned[name] = str(stored.target)
    product = emit(node, aten.matmul.default, _args(node)[0], emit(node, weight.target, stored, *rest, **weight.kwargs))
    if len(_args(node)) > 2 and _args(node)[2] is not None:
        product = emit(node, aten.add.Tensor, product, _args(node)[2])
    node.replace_all_uses_with(product)
    module.graph.erase_node(node)
    return True


def _args(node: Node) -> Any:
    return node.args


def _name(node: Any) -> str:
    return str(node.target).replace(".", "_")


def plain_constants(module: GraphModule) -> int:
    """Zero points in the dtype of the integers; constants of four bits under a name that says so."""
    return sum(_plain_constants(module, node) for node in list(module.graph.nodes) if node.target in DEQUANTIZE)


def _plain_constants(module: GraphModule, node: Node) -> bool:
    before = node.args
    stored = tensor_at(module, _args(node)[0])
    if stored is None:
        return False
    zeros = tensor_at(module, _args(node)[2])
    if zeros is not None and not zeros.is_floating_point() and zeros.dtype is not stored.dtype:
        node.update_arg(2, emit_constant(module, node, f"{_name(_args(node)[2])}", zeros.to(stored.dtype)))
    low, high = _bounds(node)
    fits = stored.dtype is torch.int8 and low >= -8 and high <= 7
    if fits and stored.dim() > 1 and not _name(_args(node)[0]).endswith(INT4):
        base = _name(_args(node)[0])
        node.update_arg(0, emit_constant(module, node, f"{base}{INT4}", stored))
    return node.args != before


def _bounds(node: Node) -> tuple[int, int]:
    if node.target is qd.dequantize_per_channel.default:
        return int(_args(node)[4]), int(_args(node)[5])
    return int(_args(node)[3]), int(_args(node)[4])
