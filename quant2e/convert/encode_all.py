"""Encodings of all observed tensors: what is wrong with some, what others lose, and what a reader should know."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule, Node

from quant2e.convert.losses import Loss, activation_loss, constant_loss, vanishes
from quant2e.errors import CalibrationError, where
from quant2e.graph.constants import Constants, evaluate
from quant2e.observers.base import inner_observer, observed
from quant2e.observers.encodings import (
    Encoding,
    PerChannelEncoding,
    PerGroupEncoding,
    PerTensorEncoding,
    encode,
)
from quant2e.observers.given import has_given
from quant2e.weights.short_form import in_short_form

_NAMED = 5
"""Tensors that an error names."""


def encode_all(
    gm: GraphModule, calls: list[Node], floats: Collection[str], *, short: bool = False
) -> dict[str, Encoding | None]:
    """The encoding of each observer, by name; None for tensors that stay float, those of ``floats`` among them.

    ``short``: scales and zero points are kept in their short forms, where they have one.
    Raises `CalibrationError` that names the first tensors without one, in the order in which data reaches them.
    """
    encodings: dict[str, Encoding | None] = dict.fromkeys(floats)
    failures: dict[Node, str] = {}
    for call in calls:
        name = str(call.target)
        if name in encodings:
            continue
        encodings[name] = None
        try:
            found = encode(gm.get_submodule(name))
            encodings[name] = _in_short_form(found) if short else found
        except CalibrationError as error:
            failures[call] = str(error)
    _raise_for(gm, failures)
    return encodings


def _in_short_form(encoding: Encoding | None) -> Encoding | None:
    if not isinstance(encoding, PerChannelEncoding | PerGroupEncoding):
        return encoding
    scale, zero_point = (in_short_form(value, repeats=True) for value in (encoding.scale, encoding.zero_point))
    return replace(encoding, scale=scale, zero_point=zero_point)


def _raise_for(gm: GraphModule, failures: Mapping[Node, str]) -> None:
    if not failures:
        return
    position = {node: i for i, node in enumerate(gm.graph.nodes)}

    def reached(call: Node) -> tuple[int, int]:
        """A parameter is reached by its first reader."""
        source = observed(call)
        return (
            (position[next(iter(call.users))], 0) if source.op == "get_attr" and call.users else (position[source], 1)
        )

    ordered = sorted(failures, key=reached)
    lines = [f"  {_place(call)}: {failures[call]}" for call in ordered[:_NAMED]]
    if (more := len(ordered) - _NAMED) > 0:
        lines.append(f"  and {more} more, which may follow from the first")
    count = f"{len(ordered)} tensor{'s' if len(ordered) > 1 else ''} cannot be quantized"
    raise CalibrationError(f"{count}:\n" + "\n".join(lines))


def losses_of(
    gm: GraphModule, calls: list[Node], encodings: Mapping[str, Encoding | None], constants: Constants
) -> tuple[str, ...]:
    """Tensors whose values integers turn into zero or clip, the worst first, a sentence for each.

    Raises `CalibrationError` for tensors of which nothing is left.
    """
    found: list[tuple[Loss, str]] = []
    gone: dict[Node, str] = {}
    for call in _different(calls, constants):
        encoding = encodings[str(call.target)]
        if not isinstance(encoding, PerTensorEncoding | PerChannelEncoding | PerGroupEncoding):
            continue
        source, observer = call.all_input_nodes[0], inner_observer(gm.get_submodule(str(call.target)))
        constant = source in constants
        loss = constant_loss(evaluate(gm, source), encoding) if constant else activation_loss(observer, encoding)
        if (loss is not None and loss.gone) or (not constant and vanishes(observer, encoding)):
            gone[call] = (
                "every value rounds to 0 at the scale that was given"
                if has_given(gm.get_submodule(str(call.target)))
                else "every value rounds to 0 at the smallest scale its spec allows: give it a smaller eps, or leave "
                "the ops that read it float"
            )
        elif loss is not None and loss.worth_a_word:
            found.append((loss, f"{_place(call)}: {loss}"))
    _raise_for(gm, gone)
    found.sort(key=lambda item: item[0].severity, reverse=True)
    return tuple(dict.fromkeys(text for _, text in found))


def _different(calls: list[Node], constants: Constants) -> Iterable[Node]:
    """One call for each observer, or for each constant that it observes."""
    seen: dict[Any, Node] = {}
    for call in calls:
        source = call.all_input_nodes[0]
        seen.setdefault((call.target, source if source in constants else None), call)
    return seen.values()


def notes_of(gm: GraphModule, calls: list[Node], encodings: Mapping[str, Encoding | None]) -> list[str]:
    """What a reader should know: choices that observers made, and values left out of a range."""
    notes = []
    first: dict[str, Node] = {}
    for call in calls:
        first.setdefault(str(call.target), call)
    for name, call in first.items():
        observer = inner_observer(gm.get_submodule(str(call.target)))
        if encodings[name] is None or has_given(gm.get_submodule(str(call.target))):
            continue
        if callable(remark := getattr(observer, "remark", None)) and (said := remark()):
            notes.append(said)
        if (masked := getattr(observer, "masked_count", 0)) > 0:
            notes.append(f"{_place(call)}: {masked} masked values (-inf or a mask's sentinel) left out of the range")
    return notes


def _place(call: Node) -> str:
    """The observed tensor, and the ops on both sides of it."""
    source = observed(call)
    users = [user for user in call.users if user.op == "call_function"]
    if source.op == "call_function" or not users:
        return f"the output of {where(source)}"
    return f"'{source.name}', read by {where(users[0])}"
