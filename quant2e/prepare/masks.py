"""Masks among observed tensors: which observers tell sentinels from data, and which tensors stay float for their sake.

Before calibration every observer learns from the graph whether the readers of its tensors may take far values for
"never" (`graph.selections`); afterwards what it counted decides, and with it every op that would read such a tensor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from quant2e.annotation.plan import Edge, Plan
from quant2e.graph.selections import WEIGHED, Marks, asked_of, keeps, marks, together
from quant2e.observers.base import inner_observer, is_observer_call, observed
from quant2e.observers.encodings import encode
from quant2e.observers.given import has_given
from quant2e.observers.uniform import UniformQuantizationObserverBase
from quant2e.ranges.sentinels import Never, owned_by_sentinels
from quant2e.report.record import RECORD_KEY, GraphRecord


def watch_sentinels(gm: GraphModule, plan: Plan, observers: Mapping[int, nn.Module]) -> None:
    """Tell the observers of ``gm``, which has none inserted yet, what sentinels of their tensors would look like."""
    asked = marks(gm.graph)
    named = {node.name: node for node in gm.graph.nodes}
    for index, observer in observers.items():
        inner = inner_observer(observer)
        if not isinstance(inner, UniformQuantizationObserverBase):
            continue
        wanted: Marks = {}
        for point in plan.groups[index].points:
            node = named[point.dst if isinstance(point, Edge) else point.node]
            own = asked.get(node, {})
            if isinstance(point, Edge):
                own = _all(part for source, part in asked_of(node, own) if source.name == point.src)
            wanted = together(wanted, own)
        inner.never = _never(wanted)


@dataclass(frozen=True, slots=True)
class FloatTensors:
    """What stays float although a quantizer asked for integers, and why.

    ``observers``: names of observers. ``readers``: names of the ops that read one of their tensors.
    """

    observers: Mapping[str, str] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)


def left_float(prepared: GraphModule) -> FloatTensors:
    """The tensors of a prepared graph that stay float by what calibration or training found.

    Those that hold sentinels, or were zero throughout where a mask would be; those whose fake-quantizer was switched
    off; and what was to be quantized only for an op that now reads a float tensor. Not among them are tensors in which
    NaN or +inf was seen: they have no range, which is an error. Where an encoding was given, it alone decides.
    """
    asked = marks(prepared.graph)
    calls: dict[str, list[Node]] = defaultdict(list)
    for node in prepared.graph.nodes:
        if is_observer_call(node):
            calls[str(node.target)].append(node)
    reasons: dict[str, str] = {}
    for name, nodes in calls.items():
        wanted = _all(asked.get(node, {}) for node in nodes)
        if objection := _objection(prepared.get_submodule(name), wanted):
            reasons[name] = f"{_tensors(nodes)} {objection}"
    given = {name for name in calls if has_given(prepared.get_submodule(name))}
    passed_on = _passed_on(prepared, asked, reasons)
    reasons = {**{name: reason for name, reason in passed_on.items() if name not in given}, **reasons}
    readers = {
        user.name: reason
        for name, reason in reasons.items()
        for call in calls[name]
        for user in call.users
        if user.op == "call_function"
    }
    record = prepared.meta.get(RECORD_KEY)
    if reasons and isinstance(record, GraphRecord):
        for group, name in zip(record.plan.groups, record.observers, strict=True):
            ops = [point.dst if isinstance(point, Edge) else "" for point in group.points]
            if name and name not in {*reasons, *given} and all(op in readers for op in ops):
                reasons[name] = readers[ops[0]]
        readers |= _results(record, {name: reason for name, reason in reasons.items() if name in given})
    derived = {name: why for name, why in _derived(prepared, reasons).items() if name not in given}
    return FloatTensors({**derived, **reasons}, readers)


def _results(record: GraphRecord, floats: Mapping[str, str]) -> dict[str, str]:
    """Ops whose result was given as float and that read nothing else in integers: a relu behind a linear, say."""
    named = list(zip(record.plan.groups, record.observers, strict=True))
    reading = {p.dst for group, name in named if name not in floats for p in group.points if isinstance(p, Edge)}
    ends = ((p.tensor, name) for group, name in named for p in group.points if not isinstance(p, Edge))
    return {op: floats[name] for op, name in ends if name in floats and op not in reading}


def _passed_on(gm: GraphModule, asked: Mapping[Node, Marks], reasons: Mapping[str, str]) -> dict[str, str]:
    """Observers of what is computed from a tensor that stays float: its "never" may be too near to the data of a sum to
    be found there, and is in it.
    """
    found: dict[str, str] = {}
    origin: dict[Node, str] = {}
    for node in gm.graph.nodes:
        is_observer = is_observer_call(node)
        if is_observer and str(node.target) in reasons:
            if not _switched_off(gm.get_submodule(str(node.target))):
                origin[node] = observed(node).name
            continue
        before = next((origin[source] for source in node.all_input_nodes if source in origin), None)
        if before is None or not keeps(node):
            continue
        origin[node] = before
        if is_observer and asked.get(node):
            found[str(node.target)] = (
                f"'{observed(node).name}' stays float: it holds what stands for \"never\" in '{before}'"
            )
    return found


def _derived(prepared: GraphModule, reasons: Mapping[str, str]) -> dict[str, str]:
    """Parameters that would be derived from those of a tensor that stays float do not exist either."""
    of_source = {id(prepared.get_submodule(name)): reason for name, reason in reasons.items()}
    return {
        name: of_source[id(source)]
        for name, module in prepared.named_children()
        for source in _sources(module)
        if id(source) in of_source
    }


def _sources(observer: Any) -> list[Any]:
    sources = getattr(observer, "sources", None)
    return sources if isinstance(sources, list) else []


def _all(parts: Iterable[Marks]) -> Marks:
    found: Marks = {}
    for part in parts:
        found = together(found, part)
    return found


def _never(asked: Marks) -> Never | None:
    """None where no finite value stands for anything."""
    below, above = asked.get(-1, math.inf), asked.get(1, math.inf)
    return None if math.isinf(below) and math.isinf(above) else (below, above)


def _tensors(calls: list[Node]) -> str:
    """The observed tensor, or the first of several that share their parameters."""
    source = observed(calls[0])
    others = len({call.all_input_nodes[0] for call in calls}) - 1
    return f"'{source.name}'{f' (or one of {others} that share its range)' if others else ''}"


def _switched_off(observer: Any) -> bool:
    enabled = getattr(observer, "fake_quant_enabled", None)
    return isinstance(enabled, Tensor) and enabled.numel() > 0 and not bool(enabled.flatten()[0])


def _objection(observer: Any, asked: Marks) -> str | None:
    """Why no integers can stand for what an observer saw, by what the readers of its tensors ask; None if they can."""
    if has_given(observer):
        stays = encode(observer) is None and getattr(inner_observer(observer), "dtype", None) != torch.float32
        return "stays float: the encodings that were given say so" if stays else None
    if _switched_off(observer):
        return "stays float: its fake-quantizer was switched off (enable_fake_quant switches it on again)"
    inner = inner_observer(observer)
    if not asked or getattr(inner, "nan_count", None) or getattr(inner, "posinf_count", None):
        return None
    masked = getattr(inner, "masked_count", 0)
    if isinstance(masked, int) and masked:
        total = getattr(inner, "total", 0)
        return (
            f'stays float: {masked} of its {total} values stand for "never" (-inf, or far from all others), '
            "which no integer can"
        )
    never = _never(asked)
    bounds = _bounds(inner)
    if never is None or bounds is None:
        return None
    if bounds == (0.0, 0.0) and never[0] <= WEIGHED and not getattr(inner, "frozen", False):
        return "stays float: it was zero in all calibration data, and a mask would be clipped to that"
    if owned_by_sentinels(*bounds, never):
        low, high = bounds
        return f'stays float: its range [{low:g}, {high:g}] is that of values that stand for "never"'
    return None


def _bounds(observer: Any) -> tuple[float, float] | None:
    """The smallest and largest value seen, by whatever observer; None without data."""
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    if not isinstance(low, Tensor) or not isinstance(high, Tensor) or not low.numel() or not high.numel():
        return None
    least, most = float(low.amin()), float(high.amax())
    return (least, most) if least <= most else None
