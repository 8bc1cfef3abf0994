"""Builder of integer nodes: position, metadata, constants, and what is recorded about them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.errors import Quant2eError
from quant2e.graph.edit import emit, emit_constant
from quant2e.integer.arithmetic.requantization import Requantization

aten = torch.ops.aten


class NoIntegerFormError(Quant2eError):
    """An op that has no integer form where it stands; the message is the reason, for the report."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One integer computation as it stands in the graph, for test vectors and simulation.

    ``name``: the float op it replaces. ``kind``: what it computes, a key of ``docs/integer_semantics.md``.
    ``inputs``: role → node that holds integers. ``output``: the node with the result. ``constants``: role → tensor.
    ``attributes``: plain numbers (strides, zero points, bounds). ``accumulator``: node with the sums, where there is
    one.
    """

    name: str
    kind: str
    inputs: dict[str, str]
    output: str
    constants: dict[str, Tensor]
    attributes: dict[str, Any]
    accumulator: str | None = None


class Builder:
    """The graph under construction. ``requantization`` is the arithmetic from one scale to another."""

    def __init__(self, gm: GraphModule, requantization: Requantization) -> None:
        self.gm = gm
        self.requantization = requantization
        self.records: list[Record] = []
        self.notes: list[str] = []
        self._place: Node | None = None

    @contextlib.contextmanager
    def at(self, place: Node) -> Iterator[None]:
        """Nodes are written in front of ``place`` and have its metadata."""
        before, self._place = self._place, place
        try:
            yield
        finally:
            self._place = before

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """One ATen op; its ``val`` is worked out where the operands' are known:
        fake tensors, or real ones in a graph of such.
        """
        assert self._place is not None
        return emit(self._place, target, *args, **kwargs)

    def constant(self, value: Tensor, name: str) -> Node:
        """A tensor that the graph keeps as a buffer called after ``name``."""
        assert self._place is not None
        return emit_constant(self.gm, self._place, name.replace(".", "_"), value)

    def cast(self, x: Node, dtype: torch.dtype) -> Node:
        """``x`` in another dtype; ``x`` itself when it already has it."""
        value = x.meta.get("val")
        if isinstance(value, Tensor) and value.dtype == dtype:
            return x
        return self.call(aten._to_copy.default, x, dtype=dtype)

    def shifted(self, x: Node, zero_point: int, dtype: torch.dtype = torch.int32) -> Node:
        """``x - zero_point`` in a wide integer dtype."""
        wide = self.cast(x, dtype)
        return self.call(aten.sub.Tensor, wide, zero_point) if zero_point else wide

    def clamp(self, x: Node, low: int, high: int) -> Node:
        """``x`` limited to ``low..high``."""
        return self.call(aten.clamp.default, x, low, high)

    def record(self, record: Record) -> None:
        """Keep what was written, for test vectors and simulation."""
        self.records.append(record)
