"""Program signatures: structure, names, dtypes and sizes of what goes in, checked before anything runs.

`quant2e.graph.captured.inputs.Inputs` is the calling convention of a captured graph: names and structure. A `Signature`
adds what compilers and runtimes ask: values of each input, symbols of the sizes that vary, the structure of the output.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from quant2e.errors import CaptureError, LoweringError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.dynamic_shapes import bounds_of
from quant2e.graph.captured.inputs import inputs_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramInput:
    """One flat input. ``value``: the fake tensor, symbolic integer or constant that the graph was captured with."""

    name: str
    value: Any
    used: bool

    @property
    def taken(self) -> bool:
        """Whether the compiled graph takes this input: constants are part of it already."""
        return self.used or isinstance(self.value, Tensor)

    @property
    def device(self) -> torch.device:
        """Where the captured example was; CPU for one without data."""
        device: torch.device = self.value.device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout that the program is compiled for: channels last where the captured example was, else contiguous."""
        value = self.value
        if value.dim() == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        return torch.contiguous_format


class Signature:
    """How a program is called: the calling convention of the graph it is made from, what each input must look like, and
    the structure of the output.

    ``inputs``: one per placeholder, in order. ``symbols``: names and inclusive bounds of the sizes that may vary.
    ``example``: flat inputs, for a graph that does not say what it was captured with.
    """

    def __init__(self, model: GraphModule, example: Sequence[Any] | None = None) -> None:
        self._convention = inputs_of(model)
        info = getattr(model.graph._codegen, "pytree_info", None)
        output = next(node for node in reversed(model.graph.nodes) if node.op == "output")
        self._outputs, spec = pytree.tree_flatten(output.args[0])
        self.out_spec: pytree.TreeSpec = info.out_spec if info is not None and info.out_spec is not None else spec
        placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
        if example is not None and len(example) != len(placeholders):
            raise LoweringError(
                f"the graph takes {len(placeholders)} input(s), {[str(node.target) for node in placeholders]}, and the "
                f"example inputs hold {len(example)}"
            )
        self.inputs = tuple(
            ProgramInput(
                name=str(node.target),
                value=_captured_value(node, example[place] if example is not None else None),
                used=any(user.name != "_guards_fn" for user in node.users),
            )
            for place, node in enumerate(placeholders)
        )
        self.symbols = _symbols(self.inputs)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """One value per placeholder; any input may be given by name. Raises `LoweringError` for another structure."""
        try:
            return self._convention.flat(args, kwargs)
        except CaptureError as error:
            raise LoweringError(str(error)) from error

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The model's output, from the values of the graph's output nodes."""
        given = iter(outputs)
        flat = [next(given) if isinstance(leaf, Node) else leaf for leaf in self._outputs]
        return pytree.tree_unflatten(flat, self.out_spec)

    def plain(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Flat inputs, checked, as contiguous tensors without gradients. Raises `LoweringError`."""
        values = self.flatten(args, kwargs)
        self.sizes(values)
        return [value.detach().contiguous() if isinstance(value, Tensor) else value for value in values]

    def laid_out(self, values: Sequence[Any]) -> list[Any]:
        """Flat inputs in the layout that the program is compiled for: tensors are copied where theirs differs.

        Strides are those of a new tensor also along dimensions of size 1, where they mean nothing and are compared.
        """
        return [
            laid_out(value, spec.memory_format) if isinstance(value, Tensor) else value
            for spec, value in zip(self.inputs, values, strict=True)
        ]

    def structured(self, values: Sequence[Any]) -> Call:
        """The call that `flatten` takes apart into ``values``."""
        args, kwargs = pytree.tree_unflatten(list(values), self.in_spec)
        return Call(tuple(args), dict(kwargs))

    def resized(self, values: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
        """Flat inputs with the sizes ``symbols`` set to ``sizes``:
        values are repeated or cut along each such dimension.
        """
        known = dict(zip(self.symbols, sizes, strict=True))
        return [
            _resized(value, spec.value.shape, known) if isinstance(spec.value, Tensor) else value
            for spec, value in zip(self.inputs, values, strict=True)
        ]

    @property
    def in_spec(self) -> pytree.TreeSpec:
        """Structure of ``((positional…), {keyword: …})``."""
        if self._convention.spec is not None:
            return self._convention.spec
        return pytree.tree_structure((tuple(range(len(self.inputs))), {}))

    @property
    def size_names(self) -> dict[Any, str]:
        """For each of ``symbols``, where it is found first, such as ``x.shape[0]``."""
        found: dict[Any, str] = {}
        for spec in self.inputs:
            sizes: Sequence[int | torch.SymInt] = spec.value.shape if isinstance(spec.value, Tensor) else ()
            for dim, size in enumerate(sizes):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    found.setdefault(size.node.expr, f"{spec.name}.shape[{dim}]")
        return {symbol: found.get(symbol, str(symbol)) for symbol in self.symbols}

    @property
    def fixed_outputs(self) -> tuple[Any, ...]:
        """Outputs that no op computes: numbers, strings, None."""
        return tuple(leaf for leaf in self._outputs if not isinstance(leaf, Node))

    def at(self, values: Sequence[Any]) -> tuple[ProgramInput, ...]:
        """The inputs with their sizes fixed to those of ``values``."""
        return tuple(
            replace(spec, value=value) if isinstance(spec.value, Tensor | torch.SymInt) else spec
            for spec, value in zip(self.inputs, values, strict=True)
        )

    def sizes(self, values: Sequence[Any]) -> tuple[int, ...]:
        """Check flat inputs against the captured ones; returns the value of each of ``symbols``.

        Raises `LoweringError` for another dtype, rank, size or constant, naming the input.
        """
        found: dict[Any, int] = {}
        for spec, value in zip(self.inputs, values, strict=True):
            if isinstance(spec.value, Tensor):
                _check_tensor(spec, value, found)
            elif isinstance(spec.value, torch.SymInt):
                if type(value) is not int:
                    raise LoweringError(f"input '{spec.name}' is a {type(value).__name__}, and must be an integer")
                _check_size(f"input '{spec.name}'", spec.value, value, found)
            elif isinstance(value, Tensor) or value != spec.value:
                raise LoweringError(
                    f"input '{spec.name}' is {value!r}, and the graph was captured with {spec.value!r}, "
                    "which is now part of it"
                )
        for symbol, (low, high) in self.symbols.items():
            if not low <= found[symbol] <= high:
                raise LoweringError(
                    f"a dynamic size is {found[symbol]}, outside of [{low:g}, {high:g}] that the graph was captured for"
                )
        return tuple(found[symbol] for symbol in self.symbols)


def signature_of(exported: ExportedProgram) -> Signature:
    """How a program made from ``exported`` is called. Sizes vary within the bounds that its author gave."""
    signature = Signature(exported.module(check_guards=False))
    given = {symbol: exported.range_constraints.get(symbol) for symbol in signature.symbols}
    signature.symbols |= {symbol: _bounds(found) for symbol, found in given.items() if found is not None}
    return signature


def _bounds(found: Any) -> tuple[float, float]:
    """Inclusive bounds of a symbol, of what torch.export keeps about it.

    It writes 2 for "no lower bound": sizes 0 and 1 are what it does not look at. And a number of its own, or the
    largest that an index can be, for "no upper bound".
    """
    upper = float(found.upper) if found.upper < sys.maxsize - 1 else math.inf
    return (float(found.lower) if found.lower != 2 else 0.0), upper


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInput:
    """What a program file says of one tensor that goes in: dtype, and each size as the least and the largest."""

    name: str
    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        sizes = ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in self.sizes)
        return f"'{self.name}': {str(self.dtype).removeprefix('torch.')}[{sizes}]"

    def takes(self, value: object) -> bool:
        """Whether a value is such a tensor."""
        return (
            isinstance(value, Tensor)
            and not unusual(value)
            and value.dtype is self.dtype
            and value.dim() == len(self.sizes)
            and all(low <= size <= high for size, (low, high) in zip(value.shape, self.sizes, strict=True))
        )


def check_bounded(exported: ExportedProgram) -> None:
    """Raise `LoweringError` naming every dynamic size of an input that has no upper bound: memory is planned for it."""
    names = set(exported.graph_signature.user_inputs)
    open_ended = [
        f"dimension {dim} of '{node.name}'"
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in names and isinstance(node.meta.get("val"), Tensor)
        for dim, size in enumerate(node.meta["val"].shape)
        if isinstance(size, SymInt) and bounds_of(size, exported.range_constraints)[1] is None
    ]
    if open_ended:
        raise LoweringError(
            f"{', '.join(open_ended)} may be of any size, and the target plans memory for the largest: "
            "give an upper bound, dynamic_batch=64 where it is quantized, or "
            f'dynamic_shapes=({{{0}: torch.export.Dim("batch", max=64)}},)'
        )


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of that shape, as a new one has them."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def laid_out(value: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A tensor in a memory format, with the strides of a new one along dimensions of size 1; itself where it is so."""
    value = value.contiguous(memory_format=memory_format)
    if 1 not in value.shape:
        return value
    order = (0, 2, 3, 1) if memory_format is torch.channels_last else tuple(range(value.dim()))
    strides = dict(zip(order, contiguous_strides([value.shape[dim] for dim in order]), strict=True))
    return value.as_strided(value.shape, [strides[dim] for dim in range(value.dim())])


def _resized(value: Tensor, shape: Sequence[int | torch.SymInt], known: Mapping[Any, int]) -> Tensor:
    for dim, size in enumerate(shape):
        if isinstance(size, torch.SymInt):
            wanted = int(size.node.expr.xreplace(known))
            value = value.index_select(dim, torch.arange(wanted) % value.shape[dim])
    return value


def _captured_value(node: Node, example: Any) -> Any:
    value = node.meta.get("val")
    if value is None and example is not None and "val" not in node.meta:
        return torch.empty_like(example, device="meta") if isinstance(example, Tensor) else example
    return value


def _symbols(inputs: Sequence[ProgramInput]) -> dict[Any, tuple[float, float]]:
    found: dict[Any, tuple[float, float]] = {}
    for spec in inputs:
        for size in spec.value.shape if isinstance(spec.value, Tensor) else [spec.value]:
            if isinstance(size, torch.SymInt):
                for symbol in sorted(size.node.expr.free_symbols, key=str):
                    found.setdefault(symbol, _bounds(size.node.shape_env.var_to_range[symbol]))
    return found


def _check_tensor(spec: ProgramInput, value: Any, found: dict[Any, int]) -> None:
    if not isinstance(value, Tensor):
        raise LoweringError(f"input '{spec.name}' is a {type(value).__name__}, and must be a tensor")
    if kind := unusual(value):
        raise LoweringError(f"input '{spec.name}' is {kind}, and must be an ordinary one with its data")
    if value.dtype is not spec.value.dtype:
        raise LoweringError(f"input '{spec.name}' has dtype {value.dtype}, and must have {spec.value.dtype}")
    if value.dim() != spec.value.dim():
        raise LoweringError(f"input '{spec.name}' has {value.dim()} dimension(s), and must have {spec.value.dim()}")
    for dim, (wanted, got) in enumerate(zip(spec.value.shape, value.shape, strict=True)):
        _check_size(f"dimension {dim} of input '{spec.name}'", wanted, got, found)


def unusual(value: Tensor) -> str:
    """What kind of tensor this is, where a runtime cannot be given its memory; empty for an ordinary one."""
    from torch._subclasses.fake_tensor import FakeTensor

    if value.is_nested:
        return "a nested tensor"
    if value.layout is not torch.strided:
        return f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
    return "a tensor without data" if value.is_meta or isinstance(value, FakeTensor) else ""


def _check_size(what: str, wanted: int | torch.SymInt, got: int, found: dict[Any, int]) -> None:
    if not isinstance(wanted, torch.SymInt):
        if wanted != got:
            raise LoweringError(
                f"{what} is {got}, and the program was compiled for {wanted}: capture the model with dynamic_shapes "
                f"to let it vary"
            )
        return
    expr = wanted.node.expr
    if expr.is_symbol:
        if found.setdefault(expr, got) != got:
            raise LoweringError(f"{what} is {got}, and must be {found[expr]} like the dimension it is tied to")
        return
    symbols = expr.free_symbols
    if symbols <= found.keys() and int(expr.xreplace(found)) != got:
        raise LoweringError(f"{what} is {got}, and must be {int(expr.xreplace(found))} ({expr})")
