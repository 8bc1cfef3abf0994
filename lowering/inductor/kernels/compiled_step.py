"""Compiled steps: an op that runs a graph which is compiled by itself, however often a program calls it.

step(key, [x, h, c])    =    [what the graph of that key computes from x, h and c]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.isolation import ALONE

_NAME = "quant2e::compiled_step"
_SCHEMA = "(int key, Tensor[] operands) -> Tensor[]"


@dataclass(slots=True, weakref_slot=True, eq=False)
class CompiledStep:
    """A graph that a program calls at several places. Whoever made the program keeps it.

    ``body``: takes and returns flat tensors of fixed sizes. ``inputs``, ``outputs``: what these look like. ``names``:
    for each call, the op of the model that each op of the body stands for. ``run``: the body itself until it is
    compiled.
    """

    body: GraphModule
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    names: Sequence[Mapping[str, str]]
    run: Callable[..., Sequence[Tensor]] = field(init=False)
    key: int = field(init=False)

    def __post_init__(self) -> None:
        self.run, self.key = self.body, next(_KEYS)
        _STEPS[self.key] = self


_KEYS = itertools.count()
_STEPS: WeakValueDictionary[int, CompiledStep] = WeakValueDictionary()


def load_step_op() -> Any:
    """``torch.ops.quant2e.compiled_step.default``, registered now. Steps that nobody keeps raise KeyError in it."""
    with ALONE:
        return _load_op()


@cache
def _load_op() -> Any:
    torch.library.define(_NAME, _SCHEMA, tags=(torch.Tag.needs_exact_strides,))
    torch.library.impl(_NAME, "CompositeExplicitAutograd")(_run)
    torch.library.register_fake(_NAME, _shapes)
    return torch.ops.quant2e.compiled_step.default


def _run(key: int, operands: Sequence[Tensor]) -> list[Tensor]:
    step = _STEPS[key]
    found = zip(step.run(*operands), step.outputs, strict=True)
    return [x if x.stride() == like.stride() else _empty(like).copy_(x) for x, like in found]


def _shapes(key: int, _: Sequence[Tensor]) -> list[Tensor]:
    return [_empty(like) for like in _STEPS[key].outputs]


def _empty(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
