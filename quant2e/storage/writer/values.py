"""Values in a program's JSON: sizes, tensors without data and symbols, as torch's schema 8 writes them.

    5                     {"as_int": 5}
    a size s77 of 3       {"as_expr": {"expr_str": "Symbol('s77', positive=True, integer=True)", "hint": {"as_int": 3}}}
    float32[2, s77]       {"dtype": 7, "sizes": [{"as_int": 2}, {"as_expr": …}], "strides": …, "layout": 7, …}

Keys that have a default in the schema are left out.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import SymBool, SymFloat, SymInt, Tensor

from quant2e.errors import Quant2eError
from quant2e.storage.reader.schema_numbers import DTYPES, LAYOUTS

Json: TypeAlias = dict[str, Any]
Bytes: TypeAlias = bytes | bytearray | memoryview


def dtype_number(dtype: torch.dtype) -> int:
    """The number of a dtype. Raises `Quant2eError` for one that files of torch cannot hold."""
    if dtype not in DTYPES:
        raise Quant2eError(f"a .pt2 file cannot hold {dtype}: torch's format has no number for it")
    return DTYPES[dtype]


def real(value: float) -> float | str:
    """A float, as JSON can write it; NaN and the infinities as the words that torch reads."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def device(value: torch.device) -> Json:
    """A device; its index only where it has one."""
    return {"type": value.type} if value == torch.device(value.type) else {"type": value.type, "index": value.index}


class Values:
    """Values as JSON. Equal expressions and tensors are described once, and ``symbols`` gathers what they depend on."""

    def __init__(self) -> None:
        self.symbols: dict[Any, Any] = {}
        """Symbols of the sizes that were written, each with the shape environment that knows its range."""
        self._texts: dict[Any, str] = {}
        self._tensors: dict[Any, Json] = {}

    def size(self, value: int | SymInt) -> Json:
        """An integer, or the expression that it is."""
        if isinstance(value, SymInt):
            return self._symbolic(value) or {"as_int": int(value.node.expr)}
        return {"as_int": int(value)}

    def number(self, value: float | SymFloat) -> Json:
        """A float, or the expression that it is."""
        if isinstance(value, SymFloat):
            return self._symbolic(value) or {"as_float": real(float(value.node.expr))}
        return {"as_float": real(float(value))}

    def truth(self, value: bool | SymBool) -> Json:
        """A bool, or the expression that it is."""
        if isinstance(value, SymBool):
            return self._symbolic(value) or {"as_bool": bool(value.node.expr)}
        return {"as_bool": value}

    def tensor(self, value: Tensor) -> Json:
        """Dtype, sizes, strides and device of a tensor. Raises `Quant2eError` for one that a file cannot hold."""
        if value.layout not in LAYOUTS:
            raise Quant2eError(f"a .pt2 file holds strided tensors, and this one is {value.layout}")
        sizes, strides, offset = tuple(value.shape), value.stride(), value.storage_offset()
        fixed = all(type(size) is int for size in (*sizes, *strides, offset))
        key = (value.dtype, sizes, strides, offset, value.requires_grad, value.device) if fixed else None
        if key is None or key not in self._tensors:
            made = {
                "dtype": dtype_number(value.dtype),
                "sizes": [self.size(size) for size in sizes],
                "requires_grad": value.requires_grad,
                "device": device(value.device),
                "strides": [self.size(stride) for stride in strides],
                "storage_offset": self.size(offset),
                "layout": LAYOUTS[value.layout],
            }
            if key is None:
                return made
            self._tensors[key] = made
        return self._tensors[key]

    def _symbolic(self, value: SymInt | SymFloat | SymBool) -> Json | None:
        """The expression of a value, and the example value where torch has one; None when it is a constant."""
        from sympy import srepr  # loads sympy, which importing quant2e does not

        expression, hint = value.node.expr, value.node.hint
        if not expression.free_symbols:
            return None
        if expression not in self._texts:
            self._texts[expression] = srepr(expression)
            self.symbols |= dict.fromkeys(expression.free_symbols, value.node.shape_env)
        made: Json = {"expr_str": self._texts[expression]}
        if isinstance(value, SymInt) and isinstance(hint, int):
            made["hint"] = {"as_int": int(hint)}
        if isinstance(value, SymFloat) and isinstance(hint, float):
            made["hint"] = {"as_float": real(float(hint))}
        return {"as_expr": made}
