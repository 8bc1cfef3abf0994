"""Translation table: what each op of quantized graphs is in ONNX.

QuantizeLinear saturates at the bounds of its dtype. Where a graph uses a narrower range, a Clip of the integers
follows, between the two ops that runtimes look for. Ranges found at run time are DynamicQuantizeLinear where they are
those of u8, which has the formula of ``choose_qparams``, and are written out otherwise. Tokens with their own
parameters, for which ONNX has no op, are quantized and dequantized in float arithmetic.

torch's exporter reads the annotations of these functions: ``int`` and ``float`` are attributes, the rest are tensors.
Arguments come by position, except for ``out_dtype``.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from quant2e.graph.qdq_ops import qd

OPSET = 21
"""The first version of ONNX with 4-bit and 16-bit integers, and with DequantizeLinear in blocks: what files are
written in unless another version is asked for."""

OPSETS = range(17, 24)
"""The versions that a file can be written in."""

TORCHS_FIRST = 18
"""The first version that torch's exporter writes; an earlier one is made of it."""

_WRITTEN: ContextVar[int] = ContextVar("opset", default=OPSET)

_BOUNDS = {"UINT8": (0, 255), "INT8": (-128, 127), "UINT16": (0, 65535), "INT16": (-32768, 32767)}


@contextmanager
def in_opset(version: int) -> Iterator[None]:
    """Emit the ops of that version of ONNX inside of the block."""
    token = _WRITTEN.set(version)
    try:
        yield
    finally:
        _WRITTEN.reset(token)


def translations(*, run_time_ops: bool = True) -> dict[Callable[..., Any], Callable[..., Any]]:
    """ATen overload → function that emits ONNX ops.

    ``run_time_ops``: ranges found at run time are ONNX's ops for them; otherwise they are float arithmetic.
    """
    table: tuple[tuple[Any, Any], ...] = (
        (qd.quantize_per_tensor.default, _quantize),
        (qd.dequantize_per_tensor.default, _dequantize),
        (qd.quantize_per_tensor.tensor, _quantize_at_run_time),
        (qd.dequantize_per_tensor.tensor, _dequantize_at_run_time),
        (qd.choose_qparams.tensor, _choose_qparams),
        (qd.choose_qparams_symmetric.tensor, _choose_qparams_symmetric),
        (qd.quantize_per_channel.default, _quantize_per_channel),
        (qd.dequantize_per_channel.default, _dequantize_per_channel),
        (qd.dequantize_per_channel_group.default, _dequantize_per_group),
        (qd.choose_qparams_per_token_asymmetric.default, _choose_per_token),
        (qd.quantize_per_token.default, _quantize_per_token),
        (qd.dequantize_per_token.default, _dequantize_per_token),
    )
    in_float: tuple[tuple[Any, Any], ...] = (
        (qd.choose_qparams.tensor, _choose_qparams_written_out),
        (qd.quantize_per_tensor.tensor, _quantize_in_float),
        (qd.dequantize_per_tensor.tensor, _dequantize_in_float),
    )
    chosen = table if run_time_ops else table + in_float
    return {target: _with_attributes(function) for target, function in chosen}


def _with_attributes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the annotations that mean attributes, as types and not as text."""
    hints = typing.get_type_hints(function)
    function.__annotations__ = {name: hint for name, hint in hints.items() if hint in (int, float) and name != "return"}
    return function


def _op() -> Any:
    import onnxscript

    return getattr(onnxscript, f"opset{max(_WRITTEN.get(), TORCHS_FIRST)}")


def _numpy(dtype: int) -> Any:
    from onnxscript import ir

    return ir.DataType(dtype).numpy()


def _constant(value: Any, dtype: Any = np.float32) -> Any:
    from onnxscript import ir

    return _op().Constant(value=ir.tensor(np.asarray(value, dtype=dtype)))


def _clipped(quantized: Any, quant_min: int, quant_max: int, dtype: int) -> Any:
    from onnxscript import ir

    if (quant_min, quant_max) == _BOUNDS.get(ir.DataType(dtype).name):
        return quantized
    low, high = _constant(quant_min, _numpy(dtype)), _constant(quant_max, _numpy(dtype))
    return _op().Clip(quantized, low, high)


def _quantize(input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> Any:
    quantized = _op().QuantizeLinear(input, _constant(scale), _constant(zero_point, _numpy(dtype)))
    return _clipped(quantized, quant_min, quant_max, dtype)


def _dequantize(
    input: Any, scale: float, zero_point: int, _quant_min: int, _quant_max: int, dtype: int, out_dtype: int = -1
) -> Any:
    return _cast(_op().DequantizeLinear(input, _constant(scale), _constant(zero_point, _numpy(dtype))), out_dtype)


def _cast(value: Any, out_dtype: int | None) -> Any:
    from onnxscript import ir

    return value if out_dtype in (-1, None, ir.DataType.FLOAT.value) else _op().Cast(value, to=out_dtype)


def _quantize_per_channel(
    input: Any, scales: Any, zero_points: Any, axis: int, quant_min: int, quant_max: int, dtype: int
) -> Any:
    zeros = _op().Cast(zero_points, to=dtype)
    quantized = _op().QuantizeLinear(input, _as_float(scales), zeros, axis=axis)
    return _clipped(quantized, quant_min, quant_max, dtype)


def _dequantize_per_channel(
    input: Any,
    scales: Any,
    zero_points: Any,
    axis: int,
    _quant_min: int,
    _quant_max: int,
    dtype: int,
    out_dtype: int = -1,
) -> Any:
    zeros = () if zero_points is None else (zero_points,)
    if zeros and zero_points.dtype != dtype:  # found at run time: `form` gave constants the dtype of the integers
        zeros = (_op().Cast(zero_points, to=dtype),)
    return _cast(_op().DequantizeLinear(input, _as_float(scales), *zeros, axis=axis), out_dtype)


def _dequantize_per_group(
    input: Any,
    scales: Any,
    zero_points: Any,
    _quant_min: int,
    _quant_max: int,
    _dtype: int,
    group_size: int,
    output_dtype: int = -1,
) -> Any:
    op, scales = _op(), _as_float(scales)
    if _WRITTEN.get() >= OPSET:
        zeros = () if zero_points is None else (zero_points,)
        return _cast(op.DequantizeLinear(input, scales, *zeros, axis=1, block_size=group_size), output_dtype)
    # no blocks yet: each group is a row of its own, with one scale
    flat = _constant([-1], np.int64)
    zeros = () if zero_points is None else (op.Reshape(zero_points, flat),)
    groups = op.Reshape(input, _constant([-1, group_size], np.int64))
    made = op.DequantizeLinear(groups, op.Reshape(scales, flat), *zeros, axis=0)
    return _cast(op.Reshape(made, op.Shape(input)), output_dtype)


def _as_float(scales: Any) -> Any:
    from onnxscript import ir

    return scales if scales.dtype is ir.DataType.FLOAT else _op().Cast(scales, to=ir.DataType.FLOAT.value)


# ------------------------------------------------------------ parameters found at run time


def _choose_qparams(input: Any, quant_min: int, quant_max: int, eps: float, dtype: int) -> Any:
    if (quant_min, quant_max, _numpy(dtype)) == (0, 255, np.uint8):
        _, scale, zero_point = _op().DynamicQuantizeLinear(input)
        return scale, zero_point
    return _choose_qparams_written_out(input, quant_min, quant_max, eps, dtype)


def _choose_qparams_written_out(input: Any, quant_min: int, quant_max: int, eps: float, dtype: int) -> Any:
    op = _op()
    low = op.Min(op.ReduceMin(input, keepdims=0), _constant(0.0))
    high = op.Max(op.ReduceMax(input, keepdims=0), _constant(0.0))
    span = _constant(float(quant_max - quant_min))
    scale = op.Max(op.Div(op.Sub(high, low), span), _constant(eps))
    offset = op.Sub(_constant(float(quant_min)), op.Round(op.Div(low, scale)))
    bounded = op.Clip(offset, _constant(float(quant_min)), _constant(float(quant_max)))
    return scale, op.Cast(bounded, to=dtype)


def _choose_qparams_symmetric(input: Any, quant_min: int, quant_max: int, eps: float, dtype: int) -> Any:
    op = _op()
    largest = op.ReduceMax(op.Abs(input), keepdims=0)
    half = _constant((quant_max - quant_min) / 2)
    return op.Max(op.Div(largest, half), _constant(eps)), _constant(0 if quant_min < 0 else 128, _numpy(dtype))


def _quantize_at_run_time(input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: int) -> Any:
    return _clipped(_op().QuantizeLinear(input, scale, zero_point), quant_min, quant_max, dtype)


def _dequantize_at_run_time(
    input: Any, scale: Any, zero_point: Any, _quant_min: int, _quant_max: int, _dtype: int, out_dtype: int = -1
) -> Any:
    return _cast(_op().DequantizeLinear(input, scale, zero_point), out_dtype)


def _quantize_in_float(input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: int) -> Any:
    from onnxscript import ir

    op = _op()
    steps = op.Round(op.Mul(input, op.Reciprocal(scale)))
    moved = op.Add(steps, op.Cast(zero_point, to=ir.DataType.FLOAT.value))
    return op.Cast(op.Clip(moved, _constant(float(quant_min)), _constant(float(quant_max))), to=dtype)


def _dequantize_in_float(
    input: Any, scale: Any, zero_point: Any, _quant_min: int, _quant_max: int, _dtype: int, out_dtype: int = -1
) -> Any:
    from onnxscript import ir

    op, to = _op(), ir.DataType.FLOAT.value
    steps = op.Sub(op.Cast(input, to=to), op.Cast(zero_point, to=to))
    return _cast(op.Mul(steps, scale), out_dtype)


# ------------------------------------------------------------ tokens, in float arithmetic: XNNPACK's formula


def _choose_per_token(input: Any, _dtype: int) -> Any:
    op = _op()
    axes = _constant([-1], np.int64)
    low = op.Min(op.ReduceMin(input, axes, keepdims=1), _constant(0.0))
    high = op.Max(op.ReduceMax(input, axes, keepdims=1), _constant(0.0))
    eps = _constant(np.finfo(np.float32).eps)
    scale = op.Max(op.Div(op.Sub(high, low), _constant(255.0)), eps)
    below, above = op.Div(low, scale), op.Div(high, scale)
    from_low = op.Greater(op.Add(op.Add(below, above), _constant(-128.0 + 127.0)), _constant(0.0))
    zero = op.Where(from_low, op.Sub(_constant(-128.0), below), op.Sub(_constant(127.0), above))
    return scale, op.Round(op.Clip(zero, _constant(-128.0), _constant(127.0)))


def _quantize_per_token(input: Any, scales: Any, zero_points: Any, quant_min: int, quant_max: int, dtype: int) -> Any:
    op = _op()
    moved = op.Round(op.Add(op.Mul(input, op.Reciprocal(scales)), zero_points))
    return op.Cast(op.Clip(moved, _constant(float(quant_min)), _constant(float(quant_max))), to=dtype)


def _dequantize_per_token(
    input: Any,
    scales: Any,
    zero_points: Any,
    _quant_min: int,
    _quant_max: int,
    _dtype: int,
    output_dtype: int,
) -> Any:
    from onnxscript import ir

    op = _op()
    values = op.Sub(op.Cast(input, to=ir.DataType.FLOAT.value), zero_points)
    return _cast(op.Mul(values, scales), output_dtype)
