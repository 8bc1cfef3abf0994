"""Writes integer nodes into a graph: position, metadata, constants, and what is recorded about them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quant2e.errors import Quant2eError
from quant2e.graph.attributes import register_tensor
from quant2e.graph.edit import set_origin
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
        self._constants: dict[tuple[str, int], Node] = {}
        values = (node.meta.get("val") for node in gm.graph.nodes)
        self._fake: FakeTensorMode | None = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)

    @contextlib.contextmanager
    def at(self, place: Node) -> Iterator[None]:
        """Nodes are written in front of ``place`` and have its provenance."""
        before, self._place = self._place, place
        try:
            with self.gm.graph.inserting_before(place):
                yield
        finally:
            self._place = before

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """One ATen op; its ``val`` is worked out where the operands' are known:
        fake tensors, or real ones in a graph of such.
        """
        assert self._place is not None
        node = self.gm.graph.call_function(target, args, kwargs)
        set_origin(node, self._place, value=self._value(node))
        return node

    def _value(self, node: Node) -> Any:
        def value(operand: Node) -> Any:
            known = operand.meta.get("val")
            if known is None:
                raise LookupError(operand.name)
            real = isinstance(known, Tensor) and not hasattr(known, "fake_mode")
            return self._fake.from_tensor(known, static_shapes=True) if real and self._fake is not None else known

        assert callable(node.target)
        try:
            args, kwargs = map_arg((node.args, node.kwargs), value)
            with self._fake or contextlib.nullcontext():
                return node.target(*args, **kwargs)
        except Exception:  # noqa: BLE001 — metadata is a convenience; exporting the graph works it out again
            return None

    def constant(self, value: Tensor, name: str) -> Node:
        """A tensor that the graph keeps as a buffer called after ``name``."""
        assert self._place is not None
        path = register_tensor(self.gm, name.replace(".", "_"), value)
        node = self.gm.graph.get_attr(path)
        set_origin(node, self._place, value=value)
        return node

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
