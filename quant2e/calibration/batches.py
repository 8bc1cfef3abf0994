"""Batches: what data given by a user must look like, and what is asked of each item before a model runs on it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from quant2e.errors import CalibrationError
from quant2e.graph.captured.calls import Call, call_of
from quant2e.graph.captured.inputs import inputs_of
from quant2e.ranges.minmax import on_host

FEW_SAMPLES = 32
"""Fewer samples than this seldom show the range; about 100 are usually enough."""


class SomeBatches(Iterable[Any]):
    """Some of the batches that a user gave: errors name each by its place among all, by which the user finds it."""

    @abstractmethod
    def place(self, index: int) -> int:
        """Where that one of these batches stands among all."""


def check_iterable(data: Any, name: str) -> None:
    """Raise `CalibrationError` unless ``data`` can be batches: a single tensor, a dict or a number cannot."""
    if isinstance(data, (Tensor, str, bytes, Mapping, Call)):
        raise CalibrationError(
            f"{name} is a {type(data).__name__}; give an iterable of batches, or wrap a single batch in a list: [batch]"
        )
    if not isinstance(data, Iterable) and not callable(getattr(data, "__getitem__", None)):
        raise CalibrationError(
            f"{name} is an iterable of batches (a list, a generator, a DataLoader), and this is a {type(data).__name__}"
        )


def check_count(num_batches: Any) -> None:
    """Raise `CalibrationError` unless ``num_batches`` is a whole number above 0, or None for all."""
    whole = isinstance(num_batches, int) and not isinstance(num_batches, bool) and num_batches >= 1
    if num_batches is not None and not whole:
        raise CalibrationError(
            f"num_batches={num_batches!r}: a whole number, at least one; leave it out for all batches"
        )


def check_kind(batch: Any, name: str) -> Call:
    """``batch`` as a call. Raises `CalibrationError` for what is no input of a model: text, a number, an object."""
    if not isinstance(batch, (Tensor, tuple, list, Mapping)):
        raise CalibrationError(
            f"{name} is a {type(batch).__name__}; give a tensor, a tuple of positional inputs "
            "or a dict of keyword inputs"
        )
    return call_of(batch)


def check_batch(batch: Any, name: str, graph: GraphModule | None = None) -> Call:
    """``batch`` as a call. Raises `CalibrationError`, which begins with ``name``, for something that is no input of a
    model, and for NaN or +inf in one: neither has a range, nor an error that could be measured.

    ``graph``: what will be called, whose arguments have names. -inf is an ordinary value of a mask. Tensors behind a
    device's queue are not read: their observers count.
    """
    call = check_kind(batch, name)
    for path, leaf in pytree.tree_leaves_with_path((list(call.args), dict(call.kwargs))):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() and on_host(leaf):
            low, high = (float(extreme) for extreme in torch.aminmax(leaf.detach()))
            if math.isnan(low) or high == math.inf:
                found = "NaN" if math.isnan(low) else "+inf"
                place = _input_name(path, graph)
                raise CalibrationError(f"{name} holds {found} in {place}: clean the data, or leave this batch out")
    return call


def _input_name(path: Sequence[Any], graph: GraphModule | None) -> str:
    """What is at ``path`` in the inputs of a call, positional and by name: ``its input 'states[0]'``."""
    which, rest = path[1], pytree.keystr(tuple(path[2:]))
    if isinstance(which, pytree.MappingKey):
        return f"its input '{which.key}{rest}'"
    names = () if graph is None else inputs_of(graph).names
    return f"its input '{names[which.idx]}{rest}'" if which.idx < len(names) else f"its input {which.idx}{rest}"


def sample_count(leaves: Iterable[Any]) -> int:
    """How many samples flat inputs hold: the largest first dimension; 1 for inputs without one."""
    return max((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), default=1)


def describe(batch: Any) -> str:
    """Shapes and dtypes of a batch, for messages."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Call):
        parts = [describe(value) for value in batch.args]
        parts += [f"{name}={describe(value)}" for name, value in batch.kwargs.items()]
        return parts[0] if len(parts) == 1 and batch.args else f"({', '.join(parts)})"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        return "(" + ", ".join(describe(v) for v in batch) + ")"
    return type(batch).__name__
