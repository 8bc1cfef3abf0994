"""Dynamic batch: the first size of every input varies, together."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule
from torch.nn import Module
from torch.utils import _pytree as pytree

from quant2e.errors import CaptureError
from quant2e.graph.captured.calls import Call


def with_dynamic_batch(
    model: Any, example: Call, most: bool | int = True, dynamic_shapes: Any = None
) -> tuple[Call, dict[str, Any]]:
    """The example with at least two samples, and the dynamic shapes to capture ``model`` with, by argument.

    One ``Dim`` for the first size of every tensor that has one; ``most``: its largest value, True for none. An example
    of one sample is repeated: torch.export takes a size of 1 for a constant. Raises `CaptureError` for
    ``dynamic_shapes`` besides, for a model that is captured already, and where the first sizes differ or no input has
    any.
    """
    if most is not True and most < 2:
        raise CaptureError(f"dynamic_batch={most!r}: True, or the largest batch, two at least")
    if dynamic_shapes is not None:
        raise CaptureError("dynamic_batch says which sizes vary: leave dynamic_shapes out, or write all there")
    if not isinstance(model, Module) or isinstance(model, GraphModule):
        raise CaptureError(
            "dynamic_batch has no effect on a model that is already captured: give dynamic_shapes when exporting"
        )
    leaves = [leaf for leaf in pytree.tree_leaves(tuple(example)) if _has_samples(leaf)]
    sizes = sorted({leaf.shape[0] for leaf in leaves})
    if len(sizes) != 1:
        found = f"those are {', '.join(map(str, sizes))}" if sizes else "no input has a dimension"
        raise CaptureError(
            f"dynamic_batch takes the first size of every input for the batch, and {found}. Say which sizes vary, "
            'as torch.export takes it: dynamic_shapes={"x": {0: torch.export.Dim("batch")}, "table": None}'
        )
    if sizes[0] < 2:
        example = Call(*pytree.tree_map_only(Tensor, _twice, tuple(example)))
    if most is not True and most < max(sizes):
        raise CaptureError(f"dynamic_batch={most}: the example inputs have {max(sizes)} samples")
    batch = Dim("batch") if most is True else Dim("batch", max=most)
    try:
        arguments = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
    except TypeError:  # capture says what is wrong with the call
        return example, {}
    return example, pytree.tree_map(lambda leaf: {0: batch} if _has_samples(leaf) else None, dict(arguments))


def _has_samples(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _twice(x: Tensor) -> Tensor:
    """Two samples from one."""
    return x.repeat(2, *(1 for _ in x.shape[1:])) if x.dim() else x
