"""A convolution and the sum behind it, quantized, as one op: oneDNN adds its accumulators to integers.

    quantize(f(conv(x, w) + dq(y)))        =        convolution_sum(x, w, y)        f: relu, or nothing

The kernel writes over ``y``. Here that is a copy, which is made where ``y`` is computed: whoever else reads ``y``, an
input or a constant, sees what it held.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from quant2e.isolation import ALONE

_NAME = "quant2e::convolution_sum"
_SCHEMA = (
    "(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor w_scale, Tensor w_zero_point, Tensor added, "
    "Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, float output_scale, int output_zero_point, "
    "ScalarType output_dtype, float added_scale, int added_zero_point, str post_op_name) -> Tensor"
)
_ADDED = 6
"""Where the integers stand that are added."""


def load_sum_op() -> Any:
    """``torch.ops.quant2e.convolution_sum.default``, registered now, with what Inductor makes of it."""
    with ALONE:
        return _load_op()


@cache
def _load_op() -> Any:
    torch.library.define(_NAME, _SCHEMA, tags=(torch.Tag.flexible_layout,))
    torch.library.impl(_NAME, "CompositeExplicitAutograd")(_run)
    torch.library.register_fake(_NAME, lambda *args: _in_channels_last(args[_ADDED]))
    op = torch.ops.quant2e.convolution_sum.default
    _register_lowering(op)
    return op


def _in_channels_last(value: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=torch.channels_last)


def _run(*args: Any) -> Tensor:
    made: Tensor = _kernel()(*_arguments(args, args[_ADDED].clone(memory_format=torch.channels_last)))
    return made


def _kernel() -> Any:
    return torch.ops.onednn.qconv2d_pointwise.binary_tensor


def _arguments(args: tuple[Any, ...], copy: Any) -> tuple[Any, ...]:
    """The kernel's arguments, in which it adds into ``copy``."""
    *others, post_op = args
    return *others[:_ADDED], copy, *others[_ADDED + 1 :], "sum", 1.0, post_op, [], ""


def _register_lowering(op: Any) -> None:
    from torch._inductor import lowering

    def lowered(*args: Any) -> Any:
        copy: Any = lowering.clone(args[_ADDED])
        copy.realize()
        return lowering.lowerings[_kernel()](*_arguments(args, copy))

    register: Any = lowering.register_lowering(op, type_promotion_kind=None)
    register(lowered)
