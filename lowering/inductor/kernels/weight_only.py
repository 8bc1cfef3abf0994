"""Weight-only linear kernels (``weight_only.cpp``): rows of floats, or of int8, by a weight of 4 or 8 bits.

A decoder computes one row at a time, and its time is that of reading the weights: a quarter of the bytes, or an eighth
at 4 bits, is what there is to gain. No kernel that torch brings reads integer weights for float32 rows at that speed,
and none computes many rows without a float copy of the weight.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quant2e.isolation import ALONE
from quant2e.observers.native.build import built, warn_unbuilt
from quant2e.observers.native.ops import OP

SOURCE = Path(__file__).with_name("weight_only.cpp")
LANES = Path(__file__).with_name("lanes.cpp")
"""What the source includes beside `OP`."""

FLOAT_ROWS, INT8_ROWS = "weight_only_linear", "int8_rows_linear"

SCHEMAS = {
    FLOAT_ROWS: "(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, Tensor bias, int outputs) -> Tensor",
    INT8_ROWS: "(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor scale, "
    "Tensor zero_point, Tensor bias, Tensor totals, int outputs) -> Tensor",
}
"""``x``: ``[..., inputs]``, contiguous; float32, or int8 with ``x_scale`` and ``x_zero_point``, float32 ``[..., 1]``,
for each row. ``weight``, ``scale``, ``zero_point``, ``totals``: of a `PackedWeight`. ``bias``: float32 ``[outputs]``,
or of no elements. Returns float32 ``[..., outputs]``.
"""

_VECTORS, _OUTPUTS, _LINE_BYTES = 4, 16, 64
"""Vectors of a strip, and outputs and bytes of a vector."""

Kernel = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A weight ``[outputs, inputs]`` as the kernels read it: in strips of 64 outputs, the last filled up with zeros.

    ``weight``: ``[strips, groups, lines, 4, 64]``; a line holds 64 bytes for 16 outputs, int8, or uint8 of two values
    each. ``scale``: ``[strips, groups, 64]``, bfloat16 where that holds every scale exactly, else float32.
    ``zero_point``: int8 ``[strips, groups, 64]``, or no elements where all of them are 0. ``totals``: float32
    ``[outputs]``, what the dequantized weights of an output add up to.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    totals: Tensor


def pack(weight: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int) -> PackedWeight:
    """Pack an int8 weight ``[outputs, inputs]`` with float32 ``scale`` and ``zero_point`` ``[outputs, groups]``.

    ``bits``: 8, or 4 for values from -8 to 7. Zero points are integers from -128 to 127.
    """
    outputs, groups = scale.shape
    size = weight.shape[1] // groups
    inputs = 8 if bits == 4 else 4  # of a line
    lines = -(-size // inputs)
    spare = -outputs % (_VECTORS * _OUTPUTS)
    grouped = F.pad(weight.reshape(outputs, groups, size), (0, lines * inputs - size, 0, 0, 0, spare))
    strips = grouped.reshape(-1, _VECTORS, _OUTPUTS, groups, lines, inputs)
    if bits == 4:
        low, high = (strips + 8).to(torch.uint8).permute(0, 3, 4, 1, 2, 5).unflatten(5, (2, 4)).unbind(5)
        packed = low | (high << 4)
    else:
        packed = strips.permute(0, 3, 4, 1, 5, 2)
    narrow = scale.to(torch.bfloat16)
    exact = torch.equal(narrow.to(torch.float32), scale)
    points = zero_point.to(torch.int8) if zero_point.any() else None
    centred = weight.reshape(outputs, groups, size).sum(2, dtype=torch.float64) - size * zero_point
    return PackedWeight(
        weight=packed.reshape(-1, groups, lines, _VECTORS, _LINE_BYTES).contiguous(),
        scale=_by_strips(narrow if exact else scale, spare),
        zero_point=torch.empty(0, dtype=torch.int8) if points is None else _by_strips(points, spare),
        totals=(centred * scale).sum(1).to(torch.float32),
    )


def _by_strips(values: Tensor, spare: int) -> Tensor:
    """``[outputs, groups]`` => ``[strips, groups, 64]``."""
    filled: Tensor = F.pad(values, (0, 0, 0, spare))
    return filled.reshape(-1, _VECTORS * _OUTPUTS, values.shape[1]).transpose(1, 2).contiguous()


def load_kernel(name: str = FLOAT_ROWS) -> Kernel | None:
    """``torch.ops.quant2e.<name>.default`` of `SCHEMAS`, built and registered now; None where there is no C++ compiler.

    A compiler that fails is a RuntimeWarning.
    """
    with ALONE:
        if not _load_kernels():
            return None
    kernel: Kernel = getattr(torch.ops.quant2e, name).default
    return kernel


@cache
def _load_kernels() -> bool:
    try:
        library = built(SOURCE, LANES, OP)
        if library is None:
            return False
        handle = ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        warn_unbuilt(SOURCE, error, "Weight-only layers compute on a float copy of their weight")
        return False
    for name, schema in SCHEMAS.items():
        torch.library.define(f"quant2e::{name}", schema, tags=(torch.Tag.needs_exact_strides,))
        torch.library.register_fake(f"quant2e::{name}", _shape)
    if failed := handle.quant2e_register():
        raise RuntimeError(f"torch refused the ops of {SOURCE.name}, at step {failed}")
    return True


def _shape(x: Tensor, *operands: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], operands[-1]), dtype=torch.float32)
