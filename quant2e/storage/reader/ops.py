"""Ops that a file may name: a closed table of torch's own, and what libraries have registered in this process.

A name becomes an op by a look-up: in a table of Python functions on sizes, in one of control flow, or in the list of
registered ops. It is never followed through attributes. The ops of any other library are code that the process has
chosen to import, like a class that it has defined.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from quant2e.errors import FileFormatError
from quant2e.storage.reader.aten_ops import ATEN_OPS

_OPERATORS = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "eq", "ne", "lt", "le", "gt", "ge",
    "and_", "or_", "not_", "lshift", "rshift",
)  # fmt: skip
_SYMBOLIC = ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum", "_sym_sqrt")

ON_SIZES: Mapping[str, Callable[..., Any]] = {
    **{f"_operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC},
    "torch.sym_sqrt": torch._sym_sqrt,  # type: ignore[attr-defined]
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt", "trunc", "log2", "exp")},
}
"""Python functions that compute sizes from sizes, by the names torch.export writes."""

_CONTROL_FLOW = frozenset(
    (
        "cond", "while_loop", "map_impl", "scan", "associative_scan", "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    )
)  # fmt: skip

_DECOMPOSED = frozenset(
    (
        "quantize_per_tensor", "dequantize_per_tensor", "quantize_per_channel", "dequantize_per_channel",
        "quantize_per_channel_group", "dequantize_per_channel_group", "quantize_per_token", "dequantize_per_token",
        "choose_qparams", "choose_qparams_symmetric", "choose_qparams_per_token", "choose_qparams_per_token_asymmetric",
        "_choose_qparams_per_token_asymmetric_impl", "fake_quant_per_channel", "convert_element_type",
    )
)  # fmt: skip
_PRIMS = frozenset(
    (
        "broadcast_in_dim", "collapse", "collapse_view", "convert_element_type", "fma", "iota", "rev", "split_dim",
        "sum", "var", "view_of", "view_of_dtype",
    )
)  # fmt: skip

_TABLES: Mapping[str, frozenset[str]] = {"aten": ATEN_OPS, "quantized_decomposed": _DECOMPOSED, "prims": _PRIMS}

_OF_TORCH = frozenset(
    (
        "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "_inductor_test", "_native", "_quantized", "_test",
        "c10d", "c10d_functional", "cuda", "debug_mode_ops", "debugprims", "export", "flex_lib", "fsdp", "higher_order",
        "inductor", "inductor_prims", "mkl", "mkldnn", "mkldnn_prepacked", "onednn", "onnx", "onnx_symbolic",
        "prepacked", "prim", "profiler", "quant2e", "quantization", "quantized", "rngprims", "sparse",
        "static_runtime", "streams", "symm_mem", "tensorexpr", "xnnpack",
    )
)  # fmt: skip
"""Namespaces of torch, and ours, none of whose ops a program needs."""

_OP = re.compile(r"torch\.ops\.(\w{1,200})\.(\w{1,200})\.(\w{1,200})", re.ASCII)


class Ops:
    """The ops that files may name, as this process has them at one moment."""

    def __init__(self) -> None:
        self._registered = frozenset(torch._C._dispatch_get_all_op_names())
        self._found: dict[str, Any] = dict(ON_SIZES)

    def find(self, target: str) -> Any:
        """The function that a file calls ``target``. Raises `FileFormatError` unless it is one that may be called."""
        if target not in self._found:
            self._found[target] = self._look_up(target)
        return self._found[target]

    def _look_up(self, target: str) -> OpOverload | HigherOrderOperator:
        shown = repr(target[:200])
        if target.startswith("torch.ops.higher_order."):
            name = target.removeprefix("torch.ops.higher_order.")
            if name in _CONTROL_FLOW and isinstance(op := getattr(torch.ops.higher_order, name), HigherOrderOperator):
                return op
        match = _OP.fullmatch(target)
        if match is None:
            raise FileFormatError(f"it calls {shown}, which is not an op that a quantized program uses")
        namespace, name, overload = match.groups()
        unknown = namespace in _TABLES and not _in_table(_TABLES[namespace], name)
        if namespace in _OF_TORCH or unknown or any(part.startswith("__") for part in (namespace, overload)):
            raise FileFormatError(f"it calls {shown}, which is not an op that a quantized program uses")
        registered = f"{namespace}::{name}" + ("" if overload == "default" else f".{overload}")
        if registered not in self._registered:
            advice = "this version of torch does not have" if namespace in _TABLES else "no library has registered"
            where = "" if namespace in _TABLES else ": import the library that registers it, and load again"
            raise FileFormatError(f"it calls '{registered}', which {advice} here{where}")
        op = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        assert isinstance(op, OpOverload), op
        if any(argument.is_out for argument in op._schema.arguments):
            raise FileFormatError(
                f"it calls {shown}, which writes its result into an operand: not an op that a quantized program uses"
            )
        return op


def _in_table(table: frozenset[str], name: str) -> bool:
    """Whether an op, or the one of which it is the form in place, is in a table."""
    return name in table or (name.endswith("_") and name.removesuffix("_") in table)
