"""Insertion of quantize and dequantize: the one edit that writes q/dq nodes.

    obs(x)        =>        dq(q(x))        with one dq for each consumer

Argument order is that of ``torch.ops.quantized_decomposed``, which partitioners and Inductor match on.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.annotation.granularity import PerTensor, PerToken
from quant2e.annotation.specs import ANNOTATION
from quant2e.graph.captured.dynamic_shapes import bounds_of
from quant2e.graph.dataflow import SHAPE_READERS
from quant2e.graph.edit import emit, emit_constant, insert_call, replace, stands_for
from quant2e.graph.fake_values import FakeValueCache, empty_like
from quant2e.graph.qdq_ops import qd
from quant2e.observers.encodings import (
    CustomEncoding,
    DynamicEncoding,
    Encoding,
    Float16Encoding,
    PerChannelEncoding,
    PerGroupEncoding,
    PerTensorEncoding,
    RoundedConstant,
)
from quant2e.observers.straight_through import round_to_grid

aten = torch.ops.aten

TAG = "quantization_tag"
"""Key under which an author marks the nodes of one annotated pattern. The q/dq nodes written for the pattern get its
mark: what leaves it through its annotated output, what enters it, and what its tensors become; nothing else does."""


def _parameters(
    gm: GraphModule, call: Node, encoding: PerTensorEncoding | PerChannelEncoding | PerGroupEncoding, prefix: str
) -> tuple[Any, ...]:
    """Arguments that q and dq share, after the tensor."""
    tail = (encoding.quant_min, encoding.quant_max, encoding.dtype)
    if isinstance(encoding, PerTensorEncoding):
        return (encoding.scale, encoding.zero_point, *tail)
    refs = [
        emit_constant(gm, call, f"{prefix}_{suffix}", value)
        for suffix, value in (("scale", encoding.scale), ("zero_point", encoding.zero_point))
    ]
    return (
        (*refs, *tail, encoding.group_size) if isinstance(encoding, PerGroupEncoding) else (*refs, encoding.axis, *tail)
    )


def round_at(gm: GraphModule, observer_call: Node, value: torch.Tensor, encoding: RoundedConstant, prefix: str) -> None:
    """Replace an observed constant by its values on the grid (`round_to_grid`); erases the call."""
    rounded = round_to_grid(value.detach(), encoding.scale.to(value.device))
    replace(observer_call, emit_constant(gm, observer_call, f"{prefix}_on_grid", rounded))


def quantize_at(
    gm: GraphModule, observer_call: Node, encoding: Encoding, prefix: str, fake_values: FakeValueCache | None = None
) -> Node | None:
    """Replace one observer call by what its encoding asks for; erases the call.

    ``prefix`` names the buffers of per-channel parameters. Returns the quantize node; None for what has none.
    ``fake_values`` keeps what it makes between calls.
    """
    if isinstance(encoding, CustomEncoding):
        encoding.observer.convert(gm, observer_call)
        return None
    if isinstance(encoding, RoundedConstant):
        raise TypeError(f"{observer_call.name}: constants are rounded by round_at")
    x = observer_call.args[0]
    if not isinstance(x, Node):
        raise TypeError(f"observer call {observer_call.name} has no tensor operand")
    if isinstance(encoding, Float16Encoding):
        _half_precision(observer_call, x)
        return None
    made: tuple[Node, ...] = ()
    if isinstance(encoding, DynamicEncoding):
        ops, made, parameters = _dynamic_parameters(observer_call, x, encoding)
    else:
        parameters = _parameters(gm, observer_call, encoding, prefix)
        ops = _OPS[type(encoding)]
    value = (fake_values or FakeValueCache())(x.meta.get("val"), encoding.dtype)
    q = insert_call(observer_call, ops[0], (x, *parameters), value=value)
    stands_for(q, observer_call)
    if isinstance(encoding, DynamicEncoding):
        for node in (*made, q):
            _mark(node, next((user for user in observer_call.users if _tag(user)), None))
    elif x.op == "get_attr" or getattr(x.meta.get(ANNOTATION), "output_qspec", None) is not None:
        _mark(q, x)
    _dequantize_per_consumer(observer_call, q, ops[1], parameters)
    return q


_OPS = {
    PerTensorEncoding: (qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default),
    PerChannelEncoding: (qd.quantize_per_channel.default, qd.dequantize_per_channel.default),
    PerGroupEncoding: (qd.quantize_per_channel_group.default, qd.dequantize_per_channel_group.default),
}


def _dynamic_parameters(
    call: Node, x: Node, encoding: DynamicEncoding
) -> tuple[Any, tuple[Node, ...], tuple[Any, ...]]:
    """The ops, the nodes that find scale and zero point, and the arguments that q and dq share after the tensor."""
    integers = (encoding.quant_min, encoding.quant_max, encoding.dtype)
    if encoding.granularity == PerTensor():
        made = _whole_tensor_parameters(call, x, encoding)
        ops = (qd.quantize_per_tensor.tensor, qd.dequantize_per_tensor.tensor)
        return ops, made, (*made[1:], *integers)
    if encoding.granularity == PerToken():
        made = _token_parameters(call, x, encoding)
        return (qd.quantize_per_token.default, qd.dequantize_per_token.default), made, (*made[1:], *integers)
    # An image of a batch is a token of the batch with one dimension for all that an image holds.
    images = emit(call, aten.flatten.using_ints, x, 1)
    made = _token_parameters(call, images, encoding)
    per_image = [emit(call, aten.flatten.using_ints, part) for part in made[1:]]
    ops = (qd.quantize_per_channel.default, qd.dequantize_per_channel.default)
    return ops, (images, *made, *per_image), (*per_image, 0, *integers)


def _token_parameters(call: Node, x: Node, encoding: DynamicEncoding) -> tuple[Node, Node, Node]:
    """``scale, zero_point = choose_qparams_per_token(x)``: ``[..., 1]`` each, in XNNPACK's formula."""
    chosen = emit(call, qd.choose_qparams_per_token_asymmetric.default, x, encoding.dtype)
    return (chosen, emit(call, operator.getitem, chosen, 0), emit(call, operator.getitem, chosen, 1))


def _whole_tensor_parameters(call: Node, x: Node, encoding: DynamicEncoding) -> tuple[Node, Node, Node]:
    """``scale, zero_point = choose_qparams(x)``; the tensor overload, so that tracing keeps them as data."""
    choose = qd.choose_qparams_symmetric.tensor if encoding.symmetric else qd.choose_qparams.tensor
    arguments = (_never_empty(call, x), encoding.quant_min, encoding.quant_max, encoding.eps, encoding.dtype)
    value = x.meta.get("val")
    values: tuple[Any, Any] | None = None
    if isinstance(value, torch.Tensor):
        values = (value.new_empty(1, dtype=torch.float64), value.new_empty(1, dtype=torch.int64))
    chosen = insert_call(call, choose, arguments, value=values)
    scale, zero_point = (
        insert_call(call, operator.getitem, (chosen, i), value=None if values is None else values[i]) for i in range(2)
    )
    return chosen, scale, zero_point


def _never_empty(call: Node, x: Node) -> Node:
    """``x``, or where a size of it may be 0 at run time its values and a zero more: every range holds zero anyway."""
    value = x.meta.get("val")
    sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    if all(size > 0 if isinstance(size, int) else bounds_of(size, {})[0] > 0 for size in sizes):
        return x
    values, zero = emit(call, aten.flatten.using_ints, x), emit(call, aten.new_zeros.default, x, [1])
    return emit(call, aten.cat.default, [values, zero])


def _tag(node: Node) -> Any:
    """The mark of a node that a quantizer annotated, or of a parameter; None for others."""
    return node.meta.get(TAG) if ANNOTATION in node.meta or node.op == "get_attr" else None


def _mark(node: Node, pattern: Node | None) -> None:
    if pattern is not None and (tag := _tag(pattern)) is not None:
        node.meta[TAG] = tag


def _dequantize_per_consumer(call: Node, q: Node, op: Any, parameters: tuple[Any, ...]) -> None:
    value = call.meta.get("val")
    # A tensor of another float type comes back as what it was; float32 is the op's default.
    out: dict[str, Any] = (
        {"out_dtype": value.dtype} if isinstance(value, torch.Tensor) and value.dtype != torch.float32 else {}
    )
    if op in (qd.dequantize_per_channel_group.default, qd.dequantize_per_token.default):  # they name that dtype
        parameters, out = (*parameters, out.get("out_dtype", torch.float32)), {}
    for user in list(call.users):
        if user.target in SHAPE_READERS:
            user.replace_input_with(call, q.all_input_nodes[0])
            continue
        origin = user if user.op == "call_function" else call
        dq = insert_call(user, op, (q, *parameters), out, value=value, origin=origin)
        stands_for(dq, call)
        _mark(dq, user)
        user.replace_input_with(call, dq)
    call.graph.erase_node(call)


def _half_precision(call: Node, x: Node) -> None:
    cast = qd.convert_element_type.no_fuse
    value = x.meta.get("val")
    own = value.dtype if isinstance(value, torch.Tensor) else torch.float32
    half = insert_call(call, cast, (x, torch.float16), value=empty_like(value, torch.float16))
    back = insert_call(call, cast, (half, own), value=empty_like(value, own))
    for node in (half, back):
        stands_for(node, call)
    replace(call, back)
