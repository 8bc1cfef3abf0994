"""Which parts of a batch are inputs of a captured graph, where a training script's batches hold more than those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import GraphModule

from quant2e.errors import CalibrationError, CaptureError
from quant2e.graph.captured.calls import Call, call_of
from quant2e.graph.captured.inputs import inputs_of

_MOST_ITEMS = 8
"""Tuples of more items are not searched for those that the graph takes."""


class Choice(NamedTuple):
    """What of each batch goes to a graph that takes ``names``.

    ``items``: positions in a tuple; None: all of it. Of dicts, what ``names`` has.
    """

    names: tuple[str, ...]
    items: tuple[int, ...] | None = None

    def call(self, batch: Any) -> Call:
        """The inputs of the graph in ``batch``, any item of data as `call_of` takes it."""
        if isinstance(batch, Call):
            return batch
        if self.items is not None and isinstance(batch, Sequence) and len(batch) > self.items[-1]:
            kept = [batch[i] for i in self.items]
            batch = kept[0] if len(kept) == 1 and isinstance(kept[0], Mapping) else tuple(kept)
        args, kwargs = call_of(batch)
        named = {name: value for name, value in kwargs.items() if name in self.names}
        return Call(args, named or kwargs)

    def left_out(self, batch: Any) -> Iterator[str]:
        """The parts of ``batch`` that do not go to the graph, in words."""
        if isinstance(batch, Call):
            return
        if self.items is not None and isinstance(batch, Sequence):
            for index in sorted(set(range(len(batch))) - set(self.items)):
                yield f"item {index}"
            batch = batch[self.items[0]] if len(batch) > self.items[0] else None
        if isinstance(batch, Mapping) and any(key in self.names for key in batch):
            yield from (f"'{key}'" for key in batch if key not in self.names)


def chosen_inputs(batch: Any, graph: GraphModule, where: str) -> Choice:
    """What of ``batch``, and of all like it, are inputs of ``graph``.

    All of it where that fits, or where nothing does: the graph then says what it wants. Sizes of the first dimension
    are not looked at, for batches may differ in it. Raises `CalibrationError`, beginning with ``where``, when several
    choices of a tuple's items fit.
    """
    names = inputs_of(graph).names
    whole = Choice(names)
    if not isinstance(batch, (tuple, list)) or isinstance(batch, Call) or len(batch) > _MOST_ITEMS:
        return whole
    if fits(graph, whole.call(batch)):
        return whole
    some: list[tuple[int, ...]] = [(i,) for i, item in enumerate(batch) if isinstance(item, Mapping)]
    if len(names) < len(batch):
        some += list(combinations(range(len(batch)), len(names)))
    found = [choice for items in dict.fromkeys(some) if fits(graph, (choice := Choice(names, items)).call(batch))]
    if len(found) > 1:
        first = ", ".join(f"batch[{i}]" for i in found[0].items or ())
        raise CalibrationError(
            f"{where} has {len(batch)} items and the model takes ({', '.join(names)}): {len(found)} choices of them "
            f"fit. Say which is meant, with transform=lambda batch: ({first},)"
        )
    return found[0] if found else whole


def fits(graph: GraphModule, call: Call) -> bool:
    """Whether ``call`` has the structure, kinds of numbers, dimensions and fixed sizes behind the first that ``graph``
    was captured with.
    """
    return _first_sizes(graph, call) is not None


def fewer_samples(graph: GraphModule, call: Call) -> tuple[int, int] | None:
    """How many samples ``call`` has and how many ``graph`` wants, where that is all that is wrong with it: too few."""
    sizes = _first_sizes(graph, call)
    wrong = {(given, wanted) for given, wanted in sizes or () if isinstance(wanted, int) and given != wanted}
    return wrong.pop() if len(wrong) == 1 and all(given < wanted for given, wanted in wrong) else None


def _first_sizes(graph: GraphModule, call: Call) -> list[tuple[int, Any]] | None:
    """First sizes of the tensors in ``call`` and those that ``graph`` was captured with; None where it does not fit."""
    try:
        leaves = inputs_of(graph).flat(call.args, call.kwargs)
    except CaptureError:
        return None
    sizes: list[tuple[int, Any]] = []
    for node, given in zip(graph.graph.find_nodes(op="placeholder"), leaves, strict=True):
        wanted = node.meta.get("val")
        if not isinstance(wanted, Tensor) or not isinstance(given, Tensor):
            if isinstance(wanted, Tensor) or isinstance(given, Tensor):
                return None
            continue
        if wanted.dim() != given.dim() or wanted.is_floating_point() != given.is_floating_point():
            return None
        pairs: list[tuple[int, Any]] = list(zip(given.shape, wanted.shape, strict=True))
        if any(isinstance(size, int) and own != size for own, size in pairs[1:]):
            return None
        sizes += pairs[:1]
    return sizes
