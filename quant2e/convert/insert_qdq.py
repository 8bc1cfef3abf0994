"""The one edit that writes q/dq nodes.

    obs(x)        =>        dq(q(x))        with one dq for each consumer

Argument order is that of ``torch.ops.quantized_decomposed``, which partitioners and Inductor match on.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.annotation.specs import ANNOTATION
from quant2e.graph.attributes import register_tensor
from quant2e.graph.edit import set_origin, stands_for
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

aten = torch.ops.aten

TAG = "quantization_tag"
"""Key under which an author marks the nodes of one annotated pattern. The q/dq nodes written for the pattern get its
mark: what leaves it through its annotated output, what enters it, and what its tensors become; nothing else does."""


def _parameters(
    gm: GraphModule, encoding: PerTensorEncoding | PerChannelEncoding | PerGroupEncoding, prefix: str
) -> tuple[Any, ...]:
    """Arguments that q and dq share, after the tensor."""
    tail = (encoding.quant_min, encoding.quant_max, encoding.dtype)
    if isinstance(encoding, PerTensorEncoding):
        return (encoding.scale, encoding.zero_point, *tail)
    refs = []
    for suffix, value in (("scale", encoding.scale), ("zero_point", encoding.zero_point)):
        path = register_tensor(gm, f"{prefix}_{suffix}", value)
        ref = gm.graph.get_attr(path)
        ref.meta["val"] = value
        refs.append(ref)
    return (
        (*refs, *tail, encoding.group_size) if isinstance(encoding, PerGroupEncoding) else (*refs, encoding.axis, *tail)
    )


def _meta_of(value: Any, dtype: torch.dtype) -> Any:
    """A tensor like ``value`` of another dtype.
    One dispatch of a fake tensor: `FakeValueCache` makes each kind once.
    """
    return torch.empty_like(value, dtype=dtype) if isinstance(value, torch.Tensor) else None


class FakeValueCache:
    """Values for ``meta["val"]``: of equal shape, strides and dtype only one is made, which nodes share."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}

    def __call__(self, value: Any, dtype: torch.dtype) -> Any:
        """What a tensor like ``value`` of that dtype looks like; None when ``value`` is no tensor."""
        if not isinstance(value, torch.Tensor):
            return None
        if not all(type(size) is int for size in value.shape):
            return _meta_of(value, dtype)  # symbolic sizes are compared by guards
        key = (type(value), value.device, dtype, tuple(value.shape), value.stride())
        if key not in self._made:
            self._made[key] = _meta_of(value, dtype)
        return self._made[key]


def round_at(gm: GraphModule, observer_call: Node, value: torch.Tensor, encoding: RoundedConstant, prefix: str) -> None:
    """Replace an observed constant by ``round(value / scale) * scale``, ties to even; erases the call.

    The quotient is rounded as ExecuTorch rounds a bias for XNNPACK: ``value * (1 / scale)`` in float32.
    """
    low, high = -(2**31), 2**31 - 1
    scale = encoding.scale.to(value.device)
    steps = torch.round(value.detach().float() * (1.0 / scale)).double().clamp(low, high)
    rounded = (steps * scale.double()).to(value.dtype)
    path = register_tensor(gm, f"{prefix}_on_grid", rounded)
    with gm.graph.inserting_before(observer_call):
        constant = gm.graph.get_attr(path)
    set_origin(constant, observer_call, value=rounded)
    observer_call.replace_all_uses_with(constant)
    gm.graph.erase_node(observer_call)


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
    with gm.graph.inserting_before(observer_call):
        if isinstance(encoding, Float16Encoding):
            _half_precision(gm, observer_call, x)
            return None
        if isinstance(encoding, DynamicEncoding):
            ops, parameters = _dynamic_parameters(gm, observer_call, x, encoding)
        else:
            parameters = _parameters(gm, encoding, prefix)
            ops = _OPS[type(encoding)]
        q = gm.graph.call_function(ops[0], (x, *parameters))
        set_origin(q, observer_call, value=(fake_values or FakeValueCache())(x.meta.get("val"), encoding.dtype))
        stands_for(q, observer_call)
    if isinstance(encoding, DynamicEncoding):
        for node in (parameters[0].args[0], *parameters[:2], q):
            _mark(node, next((user for user in observer_call.users if _tag(user)), None))
    elif x.op == "get_attr" or getattr(x.meta.get(ANNOTATION), "output_qspec", None) is not None:
        _mark(q, x)
    _dequantize_per_consumer(gm, observer_call, q, ops[1], parameters)
    return q


_OPS = {
    PerTensorEncoding: (qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default),
    PerChannelEncoding: (qd.quantize_per_channel.default, qd.dequantize_per_channel.default),
    PerGroupEncoding: (qd.quantize_per_channel_group.default, qd.dequantize_per_channel_group.default),
}


def _dynamic_parameters(gm: GraphModule, call: Node, x: Node, encoding: DynamicEncoding) -> tuple[Any, tuple[Any, ...]]:
    """``scale, zero_point = choose_qparams(x)``; the tensor overloads, so that tracing keeps them as data."""
    choose = qd.choose_qparams_symmetric.tensor if encoding.symmetric else qd.choose_qparams.tensor
    arguments = (x, encoding.quant_min, encoding.quant_max, encoding.eps, encoding.dtype)
    chosen = gm.graph.call_function(choose, arguments)
    value = x.meta.get("val")
    values: tuple[Any, Any] | None = None
    if isinstance(value, torch.Tensor):
        values = (value.new_empty(1, dtype=torch.float64), value.new_empty(1, dtype=torch.int64))
    set_origin(chosen, call, value=values)
    parts = []
    for i in range(2):
        part = gm.graph.call_function(operator.getitem, (chosen, i))
        set_origin(part, call, value=None if values is None else values[i])
        parts.append(part)
    ops = (qd.quantize_per_tensor.tensor, qd.dequantize_per_tensor.tensor)
    return ops, (*parts, encoding.quant_min, encoding.quant_max, encoding.dtype)


def _tag(node: Node) -> Any:
    """The mark of a node that a quantizer annotated, or of a parameter; None for others."""
    return node.meta.get(TAG) if ANNOTATION in node.meta or node.op == "get_attr" else None


def _mark(node: Node, pattern: Node | None) -> None:
    if pattern is not None and (tag := _tag(pattern)) is not None:
        node.meta[TAG] = tag


_SHAPE_OF = frozenset({aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int, aten.sym_storage_offset.default})
"""Ops that read the shape of a tensor and none of its values."""


def _dequantize_per_consumer(gm: GraphModule, call: Node, q: Node, op: Any, parameters: tuple[Any, ...]) -> None:
    value = call.meta.get("val")
    # A tensor of another float type comes back as what it was; float32 is the op's default.
    out: dict[str, Any] = (
        {"out_dtype": value.dtype} if isinstance(value, torch.Tensor) and value.dtype != torch.float32 else {}
    )
    if op is qd.dequantize_per_channel_group.default:  # it always names the dtype of its result
        parameters, out = (*parameters, out.get("out_dtype", torch.float32)), {}
    for user in list(call.users):
        if user.target in _SHAPE_OF:
            user.replace_input_with(call, q.all_input_nodes[0])
            continue
        with gm.graph.inserting_before(user):
            dq = gm.graph.call_function(op, (q, *parameters), out)
        set_origin(dq, user if user.op == "call_function" else call, value=value)
        stands_for(dq, call)
        _mark(dq, user)
        user.replace_input_with(call, dq)
    gm.graph.erase_node(call)


def _half_precision(gm: GraphModule, call: Node, x: Node) -> None:
    cast = qd.convert_element_type.no_fuse
    value = x.meta.get("val")
    own = value.dtype if isinstance(value, torch.Tensor) else torch.float32
    half = gm.graph.call_function(cast, (x, torch.float16))
    set_origin(half, call, value=_meta_of(value, torch.float16))
    back = gm.graph.call_function(cast, (half, own))
    set_origin(back, call, value=_meta_of(value, own))
    for node in (half, back):
        stands_for(node, call)
    call.replace_all_uses_with(back)
    gm.graph.erase_node(call)
