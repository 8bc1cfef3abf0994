"""Masks of attention: tensors of floats or booleans that broadcast to ``[samples, heads, rows, keys]``.

They enter a region as they lie in memory, with four axes; booleans become 0 where they are true and minus infinity
where not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from lowering.native.kernels.plan import RegionTensor

aten = torch.ops.aten

_AXES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """Sizes of a mask; that of samples may vary."""

    samples: Any
    heads: int
    rows: int
    keys: int

    def value(self, argument: int, *, shared: bool) -> RegionTensor:
        """As a region reads it: an image with a channel for each head."""
        return RegionTensor(floats=True, h=self.rows, w=self.keys, c=self.heads, argument=argument, shared=shared)


def mask_of(node: Node) -> Mask | None:
    """The sizes of a mask; None for what is none."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.bool) or value.device.type != "cpu":
        return None
    if not 1 <= value.dim() <= _AXES:
        return None
    sizes = (*(1,) * (_AXES - value.dim()), *value.shape)
    if any(not isinstance(size, int) for size in sizes[1:]):
        return None
    return Mask(samples=sizes[0], heads=sizes[1], rows=sizes[2], keys=sizes[3])


def float_mask(graph: Graph, mask: Node, given: Node) -> Node:
    """``given``, which is ``mask`` by now, as floats with four axes; new ops go where ``graph`` inserts them."""
    value = mask.meta["val"]
    if value.dtype is torch.bool:
        zero = graph.call_function(aten.full.default, ([], 0.0), {"dtype": torch.float32})
        given = graph.call_function(aten.where.ScalarOther, (given, zero, -math.inf))
    for _ in range(_AXES - value.dim()):
        given = graph.call_function(aten.unsqueeze.default, (given, 0))
    return given
