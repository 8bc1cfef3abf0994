"""Dynamic shapes of a captured graph: read from the graph, or those of its model, restated.

A graph has no ``*args``: what came in through them has arguments of its own, ``args_0`` and so on.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import SymInt, Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from quant2e.graph.captured.inputs import inputs_of
from quant2e.graph.captured.module import BOUNDS


def of_graph(shapes: Any, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``shapes``, given for ``model`` called with those inputs, as its captured graph takes them.

    ``forward(x, *args)`` is captured as ``forward(x, args_0, args_1, ...)``. Shapes of models without ``*args`` are
    handed back as they are.
    """
    if shapes is None or not isinstance(model, nn.Module) or isinstance(model, GraphModule):
        return shapes
    signature = inspect.signature(model.forward)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if inspect.Parameter.VAR_POSITIONAL not in kinds.values():
        return shapes
    given = (
        shapes
        if isinstance(shapes, Mapping)
        else dict(zip(signature.bind(*args, **kwargs).arguments, shapes, strict=True))
    )
    unpacked: dict[str, Any] = {}
    for name, shape in given.items():
        if kinds.get(name) is inspect.Parameter.VAR_POSITIONAL:
            unpacked |= {f"{name}_{i}": each for i, each in enumerate(shape)}
        else:
            unpacked[name] = shape
    return unpacked


def read_dynamic_shapes(gm: GraphModule) -> Any:
    """Which sizes of the inputs vary, and within which bounds, as ``torch.export`` takes it; None where none does.

    By argument, ``{"x": {0: Dim.DYNAMIC(min=…, max=…)}}``. That two sizes are equal is not said: whatever reads both
    says so again when the graph is traced.
    """
    given = getattr(gm, BOUNDS, None)
    known = dict(given) if isinstance(given, Mapping) else {}
    leaves = [_varying(node.meta.get("val"), known) for node in gm.graph.nodes if node.op == "placeholder"]
    if not any(leaf is not None for leaf in leaves):
        return None
    convention = inputs_of(gm)
    if convention.spec is None:
        return dict(zip(convention.names, leaves, strict=True))
    positional, keywords = pytree.tree_unflatten(leaves, convention.spec)
    return dict(zip(convention.names, (*positional, *keywords.values()), strict=True))


def _varying(value: Any, known: Mapping[Any, Any]) -> Any:
    """What varies of one input: sizes of a tensor by dimension, a number; None for what is fixed."""
    if isinstance(value, SymInt):
        return _dim(value, known)
    if not isinstance(value, Tensor):
        return None
    sizes: tuple[int | SymInt, ...] = tuple(value.shape)
    return {i: _dim(size, known) for i, size in enumerate(sizes) if isinstance(size, SymInt)} or None


def _dim(size: SymInt, known: Mapping[Any, Any]) -> Any:
    low, high = bounds_of(size, known)
    return Dim.DYNAMIC(min=low or None, max=high)


def bounds_of(size: SymInt, known: Mapping[Any, Any]) -> tuple[int, int | None]:
    """The least and the largest value of a size that varies; None where it has no largest.

    ``known``: bounds by symbol, as torch.export writes them; for other symbols, those that tracing found. torch.export
    writes 2 for "no lower bound": sizes 0 and 1 are what it does not look at.
    """
    from torch.utils._sympy.numbers import int_oo  # loads sympy, which importing quant2e does not
    from torch.utils._sympy.value_ranges import bound_sympy

    found = known.get(size.node.expr) or bound_sympy(size.node.expr, {**size.node.shape_env.var_to_range, **known})
    unbounded = found.upper == int_oo or found.upper >= sys.maxsize - 1
    return (int(found.lower) if found.lower > 2 else 0), (None if unbounded else int(found.upper))
