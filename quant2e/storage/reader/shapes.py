"""Shapes in a program: sizes that vary, their ranges, and a tensor without data for each value of the graph.

The values a graph computes are described by dtype, sizes and strides; a size is a number or a formula over symbols.
What comes out is what ``torch.export`` leaves in ``node.meta["val"]``: fake tensors of one mode and one environment of
symbols.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from quant2e.errors import FileFormatError
from quant2e.storage.reader.expressions import read_formula
from quant2e.storage.reader.tensors import DTYPES, device_of

_LARGEST = 1 << 62


class Shapes:
    """The symbols of one program, and the values made of them.

    ``ranges``: lower and upper bound by the text of a symbol or formula, as the file gives them; None: no bound.
    """

    def __init__(self, ranges: Mapping[str, tuple[int | None, int | None]]) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # loads sympy, which importing quant2e does not

        self.ranges = ranges
        self._symbols: dict[str, Any] = {}
        self._formulas: dict[str, Any] = {}
        self._numbers: dict[tuple[str, Any], Any] = {}
        self._environment = ShapeEnv(assume_static_by_default=True)
        self._mode = FakeTensorMode(
            allow_fallback_kernels=False, allow_non_fake_inputs=True, shape_env=self._environment
        )
        self._unbacked: set[Any] = set()
        self._count_unbacked()
        for text, (low, high) in ranges.items():
            if low is not None and high is not None and low > high:
                raise FileFormatError(f"the size '{text[:80]}' is in an empty range, from {low} to {high}")

    def integer(self, value: Mapping[str, Any]) -> int | SymInt:
        """A size: a number, or a formula over symbols."""
        if "as_int" in value:
            return int(value["as_int"])
        number = self._number(value["as_expr"], "as_int", self._environment.create_symintnode)
        assert isinstance(number, (int, SymInt))
        return number

    def real(self, value: Mapping[str, Any]) -> float | SymFloat:
        """A float that follows from sizes."""
        if "as_float" in value:
            return float(value["as_float"])
        number = self._number(value["as_expr"], "as_float", self._environment.create_symfloatnode)
        assert isinstance(number, (float, SymFloat))
        return number

    def boolean(self, value: Mapping[str, Any]) -> bool | SymBool:
        """A truth value that follows from sizes."""
        if "as_bool" in value:
            return bool(value["as_bool"])
        formula = self._formula(value["as_expr"]["expr_str"], None)
        return self._environment.create_symboolnode(formula)

    def tensor(self, meta: Mapping[str, Any]) -> Tensor:
        """A tensor without data. Raises `FileFormatError` for one that cannot be."""
        sizes = tuple(self.integer(size) for size in meta["sizes"])
        strides = tuple(self.integer(stride) for stride in meta["strides"])
        dtype, device = DTYPES[meta["dtype"]], device_of(meta["device"])
        grad = meta["requires_grad"] and (dtype.is_floating_point or dtype.is_complex)
        if len(sizes) != len(strides):
            raise FileFormatError("a tensor has another number of strides than of sizes")
        if all(type(number) is int for number in (*sizes, *strides)):
            _check_numbers(sizes, strides)
            plain = torch.empty_strided(sizes, strides, dtype=dtype, device="meta", requires_grad=grad)
            return FakeTensor(self._mode, plain, device)
        with self._mode:
            return torch.empty_strided(sizes, strides, dtype=dtype, device=device, requires_grad=grad)

    def unbacked_bindings(self, value: Any) -> Any:
        """Sizes that no input gives and that ``value`` is the first to have, with the way to them."""
        from torch.fx.experimental.symbolic_shapes import _free_unbacked_symbols_with_path

        if not self._unbacked or value is None:
            return None
        return _free_unbacked_symbols_with_path(
            value, (), shape_env=self._environment, pending=self._unbacked, simplify=True
        )

    def _number(self, expression: Mapping[str, Any], kind: str, create: Any) -> Any:
        given = expression.get("hint")
        hint = given.get(kind) if given else None
        key = (expression["expr_str"], hint)
        if key not in self._numbers:
            self._numbers[key] = create(self._formula(key[0], hint), hint=hint)
        return self._numbers[key]

    def _formula(self, text: str, hint: Any) -> Any:
        if text not in self._formulas:
            self._formulas[text] = formula = read_formula(text, self._symbols)
            self._introduce(formula, hint)
        return self._formulas[text]

    def _introduce(self, formula: Any, hint: Any) -> None:
        """Tell the environment of a formula's symbols: their ranges, and what a size was in the example."""
        from torch.fx.experimental.symbolic_shapes import SymT, symbol_is_type
        from torch.utils._sympy.numbers import int_oo

        environment = self._environment
        if hint is not None and not formula.is_number and formula not in environment.backed_var_to_val:
            environment.add_backed_var_to_val(formula, hint)
        for symbol in formula.free_symbols:
            if symbol in environment.var_to_range:
                continue
            if symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)):
                self._unbacked.add(symbol)
            low, high = self.ranges.get(str(symbol), (None, None))
            environment.constrain_symbol_range(
                symbol,
                compiler_min=-int_oo if low is None else low,
                compiler_max=int_oo if high is None else high,
            )

    def _count_unbacked(self) -> None:
        """Let new symbols that the environment may make have other names than those of the file."""
        numbers = [int(name[1:]) for name in self.ranges if name[:1] == "u" and name[1:].isdigit() and len(name) < 9]
        self._environment.unbacked_symint_counter = max(numbers, default=-1) + 1


def _check_numbers(sizes: tuple[Any, ...], strides: tuple[Any, ...]) -> None:
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if min((0, *sizes, *strides)) < 0 or last >= _LARGEST or max((0, *sizes, *strides)) >= _LARGEST:
        raise FileFormatError(f"a tensor cannot have the sizes {list(sizes)} and strides {list(strides)}")
