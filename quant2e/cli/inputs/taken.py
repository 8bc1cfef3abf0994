"""What a model takes, as data is held against it: a name, a dtype and sizes for each tensor among its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.dynamic_shapes import bounds_of
from quant2e.graph.captured.inputs import inputs_of, leaf_paths
from quant2e.graph.captured.module import BOUNDS

Size = int | tuple[int, int | None]
"""A size, or the bounds of one that varies, of which the upper one may be missing."""


@dataclass(frozen=True, slots=True)
class TakenTensor:
    """One tensor that a model takes. ``sizes``: along each axis."""

    name: str
    dtype: torch.dtype
    sizes: tuple[Size, ...]

    def __str__(self) -> str:
        sizes = ", ".join(map(size_text, self.sizes))
        return f"'{self.name}': {str(self.dtype).removeprefix('torch.')}[{sizes}]"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"name": self.name, "dtype": dtype, "sizes": [s if isinstance(s, int) else list(s) for s in self.sizes]}

    def fits(self, shape: Sequence[int], *, from_axis: int = 0) -> bool:
        """Whether an array of ``shape`` can be given, its first axes left out of the comparison."""
        pairs = list(zip(shape, self.sizes, strict=True)) if len(shape) == len(self.sizes) else None
        return pairs is not None and all(_fits(size, own) for size, own in pairs[from_axis:])


def size_text(size: Size) -> str:
    """A size as people read it: ``224``, ``1..64``, ``1..``."""
    return str(size) if isinstance(size, int) else f"{size[0]}..{'' if size[1] is None else size[1]}"


def _fits(size: int, own: Size) -> bool:
    if isinstance(own, int):
        return size == own
    return own[0] <= size and (own[1] is None or size <= own[1])


class Taken:
    """The tensors that a captured graph takes, in order, and the calls that are made of them.

    ``example``: a call of the graph; what is no tensor in it is passed on as it is.
    """

    def __init__(self, graph: GraphModule, example: Call) -> None:
        convention = inputs_of(graph)
        paths = leaf_paths(convention.names, convention.spec)
        given = getattr(graph, BOUNDS, None)
        known = dict(given) if isinstance(given, Mapping) else {}
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        values = convention.flat(*example)
        found = [
            TakenTensor(path, value.dtype, _sizes(node.meta.get("val", value), known))
            for path, node, value in zip(paths, nodes, values, strict=True)
            if isinstance(value, Tensor)
        ]
        self.tensors: tuple[TakenTensor, ...] = tuple(found)
        self._leaves, self._structure = pytree.tree_flatten((tuple(example.args), dict(example.kwargs)))
        self.example_tensors: tuple[Tensor, ...] = tuple(x for x in self._leaves if isinstance(x, Tensor))

    def call(self, tensors: Sequence[Tensor]) -> Call:
        """The call with these tensors."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        return Call(args, kwargs)

    def callable(self, program: Any) -> Callable[..., Any]:
        """A program that takes and returns flat lists, `lowering.OpenProgram`, called as the model is."""

        def run(*args: Any, **kwargs: Any) -> Any:
            outputs = program.run(self.flat(Call(args, kwargs)))
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

        return run

    def flat(self, call: Call) -> list[Tensor]:
        """The tensors of a call, in order."""
        return [leaf for leaf in pytree.tree_leaves((tuple(call.args), dict(call.kwargs))) if isinstance(leaf, Tensor)]

    def __str__(self) -> str:
        return ", ".join(map(str, self.tensors)) or "no tensor"


def _sizes(value: Any, known: Mapping[Any, Any]) -> tuple[Size, ...]:
    if not isinstance(value, Tensor):
        return ()
    sizes: tuple[int | SymInt, ...] = tuple(value.shape)
    return tuple(bounds_of(size, known) if isinstance(size, SymInt) else int(size) for size in sizes)
