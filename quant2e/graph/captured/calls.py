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


def example_call(example_inputs: Any, kwargs: Mapping[str, Any] | None = None) -> Call:
    """Example inputs as a call: a tuple or list of positional ones, a dict of keyword inputs, one tensor, or None.

    ``kwargs``: keyword inputs besides. Raises `CaptureError` for anything else, which could mean one input or several,
    and for an input that is named twice.
    """
    named = dict(kwargs or {})
    if isinstance(example_inputs, Call):
        example_inputs, given = example_inputs
    elif isinstance(example_inputs, Mapping):
        example_inputs, given = (), dict(example_inputs)
    else:
        given = {}
    if twice := named.keys() & given.keys():
        raise CaptureError(
            f"{', '.join(sorted(map(str, twice)))}: given in example_inputs and in kwargs; give each once"
        )
    if isinstance(example_inputs, Tensor):
        return Call((example_inputs,), {**given, **named})
    if isinstance(example_inputs, (tuple, list)):
        return Call(tuple(example_inputs), {**given, **named})
    if example_inputs is None:
        return Call((), named)
    raise CaptureError(
        f"example_inputs is a {type(example_inputs).__name__}: give a tensor, a tuple of positional inputs or a dict "
        "of keyword inputs; for one positional input of another kind use a tuple, (value,)"
    )
