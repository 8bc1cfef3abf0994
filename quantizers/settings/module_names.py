"""Module paths, module types and functions of a node, as users spell them."""

from __future__ import annotations

import difflib
import operator
import re
from functools import lru_cache
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from quant2e.annotation.pattern import op
from quant2e.errors import AnnotationError
from quantizers.rewrites.matmul_to_linear import ORIGINAL_TARGET

_GETATTR = re.compile(r"getattr\((?P<owner>[^()]*), '(?P<name>[^']*)'\)")
_INDEX = re.compile(r"(?:\._modules)?\[['\"]?(?P<name>[^\]'\"]+)['\"]?\]")


def module_stack(node: Node) -> list[tuple[str, str]]:
    """``(path, qualified type)`` of the modules around a node, outermost first; the root's path is empty."""
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        qualified = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        found.append((plain_path(str(path)), qualified))
    return found


def enclosing_paths(node: Node) -> list[str]:
    """Paths of the modules around a node, innermost first, with containers (``ModuleList``), which are never called."""
    paths: dict[str, None] = {}
    for path, _ in reversed(module_stack(node)):
        while path:
            paths[path] = None
            path = path.rpartition(".")[0]
    return [*sorted(paths, key=lambda p: p.count("."), reverse=True), ""]


@lru_cache(maxsize=4096)
def plain_path(path: str) -> str:
    """``blocks.0.linear`` for ``L['self'].blocks[0].linear`` and the other spellings of tracers and scripts."""
    while (plain := _GETATTR.sub(r"\g<owner>.\g<name>", path)) != path:
        path = plain
    path = path.removeprefix("L['self']")
    path = _INDEX.sub(r".\g<name>", path)
    # The second call of a module is traced as "linear@1".
    return ".".join(part.partition("@")[0] for part in path.split(".") if part)


def type_name(module_type: type | str) -> str:
    """The qualified name by which a module type is found in a graph."""
    if isinstance(module_type, str):
        public = _import(module_type)
        return module_type if public is None else f"{public.__module__}.{public.__qualname__}"
    return f"{module_type.__module__}.{module_type.__qualname__}"


def _import(qualified: str) -> type | None:
    """``torch.nn.Linear`` as the class, if it is spelled by its public name."""
    found: Any = torch
    for part in qualified.removeprefix("torch.").split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and qualified.startswith("torch.") else None


def targets_of(function: Any) -> frozenset[Any]:
    """The ATen overloads that a function of torch, an overload or a packet stands for, in-place spellings included.

    Raises `AnnotationError` for what has no ATen op of its name.
    """
    if isinstance(function, OpOverload | OpOverloadPacket):
        return op(function).targets
    name = str(getattr(function, "__name__", function)).strip("_").removeprefix("i" if function in _IN_PLACE else "")
    packet = getattr(torch.ops.aten, name, None)
    if not callable(function) or not isinstance(packet, OpOverloadPacket) or not _computes(packet):
        near = difflib.get_close_matches(name, dir(torch.nn.functional), n=3)
        raise AnnotationError(
            f"{function!r} is not an op: give an overload (torch.ops.aten.linear.default), a packet, or a function "
            "such as torch.nn.functional.linear" + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    return op(packet).targets


def _computes(packet: OpOverloadPacket) -> bool:
    """Whether some overload answers with a tensor."""
    schemas = (getattr(packet, name)._schema for name in packet.overloads())
    return any("Tensor" in str(result.type) for schema in schemas for result in schema.returns)


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.imatmul)


def targets(node: Node) -> frozenset[Any]:
    """What a node calls, and what it called before it was rewritten."""
    return frozenset((node.target, node.meta.get(ORIGINAL_TARGET, node.target)))
