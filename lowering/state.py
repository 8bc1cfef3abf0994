"""State: what calls leave behind in buffers, kept apart from the user's while programs are run and compared.

A graph that writes to its buffers (a counter, a cache, a running mean) computes something else at the next call. A
lowered program starts with the values that the graph had when it was lowered, and has them for itself. Comparing the
two runs copies of both from the same values, and leaves program and graph as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.graph.captured.module import independent_copy
from quant2e.graph.mutation import clone_together, written_attributes

State = Mapping[str, Tensor]
"""Values of the tensors that a graph writes, by their paths in it."""


def state_of(model: Any) -> State:
    """A copy of what the graph ``model`` writes to; empty for one that keeps no state, and for what is no graph."""
    if not isinstance(model, GraphModule):
        return {}
    written = written_attributes(model)
    copies = clone_together(written.values())
    return {path: copies[id(tensor)] for path, tensor in written.items()}


class KeepsState:
    """A lowered program, or a part of one, whose calls may leave state behind."""

    @property
    def initial_state(self) -> State:
        """What the program starts with; empty for one without state."""
        return {}

    def _exchange_state(self, state: Any) -> Any:
        """Put ``state`` in place of what calls have left so far, which is returned; None: `initial_state`.

        What a state looks like is up to the program. Called for programs that have one only.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Start over: the next call sees the state that the graph had when it was lowered, as the first call did."""
        if self.initial_state:
            self._exchange_state(None)


def initial_state_of(program: Any) -> State:
    """What a program starts with, if it is a lowered one."""
    return program.initial_state if isinstance(program, KeepsState) else {}


@contextmanager
def from_start(program: Any) -> Iterator[None]:
    """Inside, ``program`` begins with its initial state; afterwards it has the state that it had before."""
    if not isinstance(program, KeepsState) or not program.initial_state:
        yield
        return
    before = program._exchange_state(None)
    try:
        yield
    finally:
        program._exchange_state(before)


class Apart:
    """Something callable, as a callable of its own: calls write to copies of its tensors.

    ``stateful``: whether calls write to tensors of the model; of modules that are no graphs it is known after a call.
    ``start``: values to begin with, by path, for tensors that the graph writes; its own values where there are none.
    A lowered program is called as it is (see `from_start`), and so is a function.
    """

    def __init__(self, model: Callable[..., Any], start: State | None = None) -> None:
        self.model: Callable[..., Any] = model
        self._versions: dict[str, tuple[int, int]] = {}
        self._tensors: dict[str, Tensor] = {}
        if isinstance(model, GraphModule):
            self.model = own_graph(model, start or {})
        elif isinstance(model, torch.nn.Module):
            buffers = dict(model.named_buffers(remove_duplicate=False))
            copies = clone_together(buffers.values())
            self._tensors = {path: copies[id(buffer)] for path, buffer in buffers.items()}
            self._versions = self._now()

    @property
    def stateful(self) -> bool:
        if isinstance(self.model, GraphModule):
            return bool(written_attributes(self.model))
        return self._now() != self._versions

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._tensors and isinstance(self.model, torch.nn.Module):
            return torch.func.functional_call(self.model, self._tensors, args, kwargs)
        return self.model(*args, **kwargs)

    def _now(self) -> dict[str, tuple[int, int]]:
        return {path: (id(tensor), tensor._version) for path, tensor in self._tensors.items()}


def own_graph(graph: GraphModule, start: State | None = None) -> GraphModule:
    """The graph itself where it writes to nothing; otherwise a copy that writes to tensors of its own.

    ``start``: values to begin with, by path.
    """
    if not written_attributes(graph):
        return graph
    copy = independent_copy(graph)
    with torch.no_grad():
        for path, tensor in written_attributes(copy).items():
            value = (start or {}).get(path)
            if value is not None and value.shape == tensor.shape and value.dtype is tensor.dtype:
                tensor.copy_(value)
    return copy
