"""Calls: what a model is called with, positional and keyword inputs.

x → (x,), {}    (x, y) → (x, y), {}    {"x": x} → (), {"x": x}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quant2e.errors import CaptureError


class Call(NamedTuple):
    """The inputs of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def copied(self) -> Call:
        """The same call with tensors of its own: a model may write into its inputs."""
        return Call(*pytree.tree_map_only(Tensor, torch.clone, tuple(self)))


def call_of(batch: Any) -> Call:
    """One item of data as a call: a tuple or list of positional inputs, a dict of keyword inputs, or a single input."""
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, Mapping):
        return Call((), dict(batch))
    return Call(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {})


def positional_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """Example inputs as the tuple that torch.export takes: a tensor stands for itself, None for no inputs.

    Raises `CaptureError` for anything else, which could mean one input or several.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs)
    if example_inputs is None:
        return ()
    hint = "for keyword inputs use kwargs=, " if isinstance(example_inputs, Mapping) else ""
    raise CaptureError(
        f"example_inputs is a {type(example_inputs).__name__}: {hint}for one positional input use a tuple, (value,)"
    )
