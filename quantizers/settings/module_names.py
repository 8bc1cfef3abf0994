"""Module paths, module types and functions of a node, as users spell them."""

from __future__ import annotations

import difflib
import operator
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from quant2e.annotation.pattern import op
from quant2e.errors import AnnotationError
from quantizers.rewrites.matmul_to_linear import ORIGINAL_TARGET


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
