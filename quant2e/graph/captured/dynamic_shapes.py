"""Dynamic shapes of a model, restated for the graph that was captured from it.

A graph has no ``*args``: what came in through them has arguments of its own, ``args_0`` and so on.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule


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
