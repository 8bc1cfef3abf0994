"""How a captured graph is called: its inputs and outputs as flat lists, and what each input must look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from quant2e.errors import LoweringError


@dataclass(frozen=True, slots=True, kw_only=True)
class InductorInput:
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


class InductorSignature:
    """Inputs and outputs of a captured graph.

    ``inputs``: one per placeholder, in order. ``symbols``: names and inclusive bounds of the sizes that may vary.
    """

    def __init__(self, model: GraphModule, example: Sequence[Any] | None) -> None:
        info = getattr(model.graph._codegen, "pytree_info", None)
        self._in_spec: pytree.TreeSpec | None = info.in_spec if info is not None else None
        self._out_spec: pytree.TreeSpec | None = info.out_spec if info is not None else None
        output = next(node for node in reversed(model.graph.nodes) if node.op == "output")
        leaves, spec = pytree.tree_flatten(output.args[0])
        self._out_spec = self._out_spec or spec
        self._outputs = leaves
        placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
        if example is not None and len(example) != len(placeholders):
            raise LoweringError(
                f"the graph takes {len(placeholders)} input(s), {[str(node.target) for node in placeholders]}, and the "
                f"example inputs hold {len(example)}"
            )
        self.inputs = tuple(
            InductorInput(
                name=str(node.target),
                value=_captured_value(node, example[place] if example is not None else None),
                used=any(user.name != "_guards_fn" for user in node.users),
            )
            for place, node in enumerate(placeholders)
        )
        self.symbols = _symbols(self.inputs)

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """One value per placeholder. Raises `LoweringError` when the structure is not the captured one."""
        if self._in_spec is None:
            if kwargs:
                raise LoweringError(f"this graph takes positional inputs only, not {sorted(kwargs)}")
            return pytree.tree_leaves(args, is_leaf=lambda leaf: leaf is None)
        names = self._in_spec.child(1).context or []
        if sorted(names) != sorted(kwargs):
            raise LoweringError(f"keyword inputs {sorted(kwargs)}: the model was captured with {sorted(names)}")
        leaves, spec = pytree.tree_flatten((tuple(args), {name: kwargs[name] for name in names}))
        if spec != self._in_spec:
            raise LoweringError(
                f"the inputs are structured as {spec}, and the model was captured with {self._in_spec}: "
                f"pass the same positional and keyword inputs as in the example inputs"
            )
        return leaves

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The model's output, from the values of the graph's output nodes."""
        given = iter(outputs)
        flat = [next(given) if isinstance(leaf, Node) else leaf for leaf in self._outputs]
        assert self._out_spec is not None
        return pytree.tree_unflatten(flat, self._out_spec)

    def laid_out(self, values: Sequence[Any]) -> list[Any]:
        """Flat inputs in the layout that the program is compiled for: tensors are copied where theirs differs."""
        return [
            value.contiguous(memory_format=spec.memory_format) if isinstance(value, Tensor) else value
            for spec, value in zip(self.inputs, values, strict=True)
        ]

    def structured(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword inputs, from one value per placeholder: the inverse of `flatten`."""
        if self._in_spec is None:
            return tuple(values), {}
        args, kwargs = pytree.tree_unflatten(list(values), self._in_spec)
        return tuple(args), dict(kwargs)

    def resized(self, values: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
        """Flat inputs with the sizes ``symbols`` set to ``sizes``: values are repeated or cut along each such dimension."""
        known = dict(zip(self.symbols, sizes, strict=True))
        return [
            _resized(value, spec.value.shape, known) if isinstance(spec.value, Tensor) else value
            for spec, value in zip(self.inputs, values, strict=True)
        ]

    def specs(self) -> tuple[pytree.TreeSpec, pytree.TreeSpec]:
        """Structure of ``((positional…), {keyword: …})`` and of the output."""
        assert self._out_spec is not None
        if self._in_spec is not None:
            return self._in_spec, self._out_spec
        return pytree.tree_structure((tuple(range(len(self.inputs))), {})), self._out_spec

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

    def at(self, values: Sequence[Any]) -> tuple[InductorInput, ...]:
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
                _check_size(f"input '{spec.name}'", spec.value, value, found)
            elif value != spec.value:
                raise LoweringError(
                    f"input '{spec.name}' is {value!r}, and the graph was captured with {spec.value!r}, which is now part of it"
                )
        for symbol, (low, high) in self.symbols.items():
            if not low <= found[symbol] <= high:
                raise LoweringError(
                    f"a dynamic size is {found[symbol]}, outside of [{low:g}, {high:g}] that the graph was captured for"
                )
        return tuple(found[symbol] for symbol in self.symbols)


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


def _symbols(inputs: Sequence[InductorInput]) -> dict[Any, tuple[float, float]]:
    found: dict[Any, tuple[float, float]] = {}
    for spec in inputs:
        for size in spec.value.shape if isinstance(spec.value, Tensor) else [spec.value]:
            if isinstance(size, torch.SymInt):
                for symbol in sorted(size.node.expr.free_symbols, key=str):
                    bounds = size.node.shape_env.var_to_range[symbol]
                    # torch.export writes 2 for "no lower bound": sizes 0 and 1 are what it does not look at
                    low = float(bounds.lower) if bounds.lower > 2 else 0.0
                    found.setdefault(symbol, (low, float(bounds.upper)))
    return found


def _check_tensor(spec: InductorInput, value: Any, found: dict[Any, int]) -> None:
    if not isinstance(value, Tensor):
        raise LoweringError(f"input '{spec.name}' is a {type(value).__name__}, and must be a tensor")
    if value.dtype is not spec.value.dtype:
        raise LoweringError(f"input '{spec.name}' has dtype {value.dtype}, and must have {spec.value.dtype}")
    if value.dim() != spec.value.dim():
        raise LoweringError(f"input '{spec.name}' has {value.dim()} dimension(s), and must have {spec.value.dim()}")
    for dim, (wanted, got) in enumerate(zip(spec.value.shape, value.shape, strict=True)):
        _check_size(f"dimension {dim} of input '{spec.name}'", wanted, got, found)


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
