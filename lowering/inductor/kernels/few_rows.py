"""Weight-only linear kernel for few float rows and an integer weight (``few_rows.cpp``).

A decoder computes one row at a time, and its time is that of reading the weights: a quarter of the bytes, or an eighth
at 4 bits, is what there is to gain. No kernel that torch brings reads int8 weights for float32 rows at that speed.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant2e.isolation import ALONE
from quant2e.observers.native.build import built, warn_unbuilt
from quant2e.observers.native.ops import OP

SOURCE = Path(__file__).with_name("few_rows.cpp")

_NAME = "quant2e::few_rows_linear"
_SCHEMA = "(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, Tensor bias, bool packed) -> Tensor"

FLAGS = ("-ffp-contract=fast", "-Wno-psabi")
"""For this kernel: its sums may be contracted."""

BLOCK = 32
"""Packed weights lie in blocks of so many inputs; a group is a multiple of it."""

Linear = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], Tensor]


def load_kernel() -> Linear | None:
    """``torch.ops.quant2e.few_rows_linear.default``, built and registered now; None where there is no C++ compiler.

    ``x``: float32 ``[..., inputs]``, contiguous. ``weight``: int8 ``[outputs, inputs]``, or what `packed` made of it.
    ``scale``, ``zero_point``: float32 ``[outputs, groups]``. ``bias``: float32 ``[outputs]``. Returns float32
    ``[..., outputs]``. A compiler that fails is a RuntimeWarning.
    """
    with ALONE:
        return _load_kernel()


@cache
def _load_kernel() -> Linear | None:
    try:
        library = built(SOURCE, OP, flags=FLAGS)
        if library is None:
            return None
        handle = ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        warn_unbuilt(SOURCE, error, "Weight-only layers compute on a float copy of their weight")
        return None
    torch.library.define(_NAME, _SCHEMA, tags=(torch.Tag.needs_exact_strides,))
    torch.library.register_fake(_NAME, _shape)
    if failed := handle.quant2e_register():
        raise RuntimeError(f"torch refused the op of {SOURCE.name}, at step {failed}")
    op: Linear = torch.ops.quant2e.few_rows_linear.default
    return op


def _shape(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def packed(weight: Tensor) -> Tensor:
    """Two values in a byte: uint8 ``[outputs, inputs / 2]`` of an int8 weight with values from -8 to 7.

    Of each `BLOCK` of inputs, byte ``i`` holds input ``i`` in its low half and input ``i + 16`` in its high half, each
    plus 8.
    """
    outputs, inputs = weight.shape
    low, high = (weight + 8).to(torch.uint8).reshape(outputs, inputs // BLOCK, 2, BLOCK // 2).unbind(2)
    return (low | (high << 4)).reshape(outputs, inputs // 2).contiguous()
