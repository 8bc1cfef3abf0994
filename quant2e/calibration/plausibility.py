"""Plausibility of statistics: why an observer cannot have measured them, or cannot take them over.

Statistics come from files and from other processes, and a number that was never measured becomes a scale without a
word. What every state of an estimator fulfils is therefore asked of each: finite extremes in order, counts that add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.graph.control_flow import graphs_of, prefixed
from quant2e.graph.fake_values import node_tensor
from quant2e.observers.uniform import UniformQuantizationObserverBase
from quant2e.ranges.histogram import Histogram
from quant2e.ranges.minmax import TALLY, MinMax, MovingAverage

ESTIMATORS: Mapping[str, Any] = {kind.__name__: kind() for kind in (MinMax, MovingAverage, Histogram)}
"""What makes and merges states, whose shapes say the rest: whole tensors, channels or groups, and how many bins."""

MOST_VALUES = 1 << 53
"""More values than anybody observes: sums of counts up to here are exact."""

_MOST_BINS = 1 << 20

State = Mapping[str, Tensor]
"""Buffers of one observer, by name."""


def implausible(kind: object, state: object) -> str | None:
    """Why an estimator of this name cannot have made this state; None when it can."""
    if not isinstance(kind, str) or kind not in ESTIMATORS:
        return f"its estimator, {str(kind)[:80]!r}, is none of {', '.join(ESTIMATORS)}"
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        return "they are not a dict of tensors"
    wanted = vars(ESTIMATORS[kind].init())
    if set(wanted) != set(state) or any(state[part].dtype != value.dtype for part, value in wanted.items()):
        return f"they are not those of a {kind}"
    shape = state["min_val"].shape
    same = state["max_val"].shape == shape and state["counts"].shape == wanted["counts"].shape
    if "histogram" in state:
        histogram = state["histogram"]
        same = same and histogram.shape[:-1] == shape and histogram.dim() == len(shape) + 1
        same = same and 2 <= histogram.shape[-1] <= _MOST_BINS
    if not same:
        return f"they do not have the shapes of a {kind}"
    return _miscounted(state) or _out_of_order(state)


def _miscounted(state: State) -> str | None:
    counts = dict(zip(TALLY, state["counts"].tolist(), strict=True))
    if min(counts.values()) < 0 or counts["total"] > MOST_VALUES:
        return f"the counts are {counts}"
    usable = _usable(state)
    if usable < 0:
        return f"of {counts['total']} values more are not data than there are: {counts}"
    if "histogram" in state and state["histogram"].numel():
        least, most = (int(extreme) for extreme in torch.aminmax(state["histogram"]))
        if least < 0 or most > usable or int(state["histogram"].sum()) != usable:
            return f"the histogram does not count the {usable} values that were seen"
    return None


def _usable(state: State) -> int:
    total, *others = state["counts"].tolist()
    return int(total - sum(others))


def _out_of_order(state: State) -> str | None:
    low, high = state["min_val"], state["max_val"]
    unseen = torch.isposinf(low) & torch.isneginf(high)
    ordered = torch.isfinite(low) & torch.isfinite(high) & (low <= high)
    if not bool((unseen | ordered).all()):
        place = int((~(unseen | ordered)).flatten().nonzero()[0])
        found = f"[{float(low.flatten()[place]):g}, {float(high.flatten()[place]):g}]"
        return f"the smallest and the largest value are {found}" + (f" at {place}" if low.dim() else "")
    if bool(ordered.any()) != (_usable(state) > 0):
        return f"they hold {'a' if bool(ordered.any()) else 'no'} range, and {_usable(state)} values were seen"
    return None


def unfit(observer: UniformQuantizationObserverBase[Any], seen: Tensor | None, kind: str, state: State) -> str | None:
    """Why ``observer`` cannot take over this state; None when it can. ``seen``: what it observes, where that is known.

    ``kind``: the name of the estimator that made the state, which `implausible` has nothing against.
    """
    estimator = observer.estimator
    if type(estimator).__name__ != kind:
        return f"they are those of a {kind}, and it is a {type(estimator).__name__}"
    axis, group_size = getattr(estimator, "axis", None), getattr(estimator, "group_size", None)
    shape, bins = state["min_val"].shape, getattr(estimator, "bins", None)
    if bins is not None and state["histogram"].shape[-1] != bins:
        return f"they have {state['histogram'].shape[-1]} bins, and it has {bins}"
    wanted = _sizes(seen, axis, group_size)
    if (axis is None and group_size is None) != (len(shape) == 0):
        return f"they have the shape {list(shape)}, and it measures {'channels' if not len(shape) else 'whole tensors'}"
    if wanted is None or tuple(shape) == (0,):  # unknown; nothing was seen
        return None
    if len(shape) != len(wanted) or any(type(b) is int and a != b for a, b in zip(shape, wanted, strict=True)):
        return f"they have the shape {list(shape)}, and it measures {[str(size) for size in wanted]} ranges"
    return None


def _sizes(seen: Tensor | None, axis: int | None, group_size: int | None) -> tuple[int | torch.SymInt, ...] | None:
    """The shape that the ranges of a tensor have; None where it is not known."""
    if seen is None:
        return None
    if group_size is not None:
        return (*seen.shape[:-1], seen.shape[-1] // group_size) if seen.dim() else None
    if axis is None:
        return ()
    return (seen.shape[axis],) if -seen.dim() <= axis < seen.dim() else None


def observed_values(prepared: GraphModule) -> dict[str, Tensor]:
    """What each observer of a program looks at, as the (fake) values of its graphs have it, by the observer's path."""
    found: dict[str, Tensor] = {}
    for path, graph in graphs_of(prepared):
        for node in graph.graph.nodes:
            value = node_tensor(node.args[0]) if node.op == "call_module" and node.args else None
            if value is not None:
                found.setdefault(prefixed(path, str(node.target)), value)
    return found
