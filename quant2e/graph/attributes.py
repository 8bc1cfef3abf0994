"""Attributes of the module around a graph: the tensors and modules that ``get_attr`` nodes read, by dotted path.

attribute(gm, "layer.0.weight")  =  gm.layer.0.weight
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from quant2e.errors import PassError

_RAISE = object()


def attribute(module: nn.Module, path: str, default: Any = _RAISE) -> Any:
    """Value at a dotted path below ``module``. Where there is none: ``default``, or `PassError` without one."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, _RAISE)
        if value is _RAISE:
            if default is not _RAISE:
                return default
            raise PassError(f"the graph reads the attribute '{path}', which its module does not have")
    return value


def tensor_at(module: nn.Module, node: object) -> Tensor | None:
    """The parameter or buffer itself that a ``get_attr`` node reads; None for any other node or value."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value = attribute(module, str(node.target), None)
    return value if isinstance(value, Tensor) else None


def free_path(module: nn.Module, path: str) -> str:
    """``path``, or the first of ``path_1``, ``path_2``, … that is not taken.
    A parameter or buffer that is None is free.
    """
    parents, dot, leaf = path.rpartition(".")
    owner = attribute(module, parents, None) if dot else module
    owner = nn.Module() if owner is None else owner
    names = itertools.chain((leaf,), (f"{leaf}_{number}" for number in itertools.count(1)))
    return f"{parents}{dot}{first_free(owner, names)}"


def first_free(owner: nn.Module, names: Iterable[str]) -> str:
    """The first of ``names`` under which ``owner`` holds nothing. A parameter or buffer that is None is free."""
    tables = (owner._parameters, owner._buffers)
    empty = {name for table in tables for name, value in table.items() if value is None}
    return next(name for name in names if name in empty or not hasattr(owner, name))


def register_tensor(module: nn.Module, path: str, value: Tensor) -> str:
    """Register a buffer at `free_path`, below new modules where the path has none; returns where."""
    path = free_path(module, path)
    *parents, leaf = path.split(".")
    owner = module
    for part in parents:
        child = getattr(owner, part, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    owner._parameters.pop(leaf, None)
    owner.register_buffer(leaf, value)
    return path


def replace_tensor(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Put a parameter at ``path``, in place of a parameter, buffer or constant. Other owners of the old one keep it."""
    prefix, _, name = path.rpartition(".")
    owner = module.get_submodule(prefix)
    for table in (owner._buffers, vars(owner)):
        table.pop(name, None)
    owner.register_parameter(name, parameter)
