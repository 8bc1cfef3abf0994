"""Calibration statistics as a value: collected, saved, merged, put back, and the source of other parameters.

A statistics file is a zip of one JSON document and one ``.npy`` array per buffer: reading it runs no code, and whatever
could not have been measured is refused. It is bound to the graph and the plan it was collected on; for another model
the error shows the first lines that differ.
"""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.calibration.plausibility import ESTIMATORS, State, implausible, observed_values, unfit
from quant2e.documents.arrays import read_archive, read_array, write_archive
from quant2e.documents.json_text import read_json
from quant2e.documents.schema import from_record, of_format
from quant2e.errors import CalibrationError, FileFormatError
from quant2e.files import atomic_file
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.control_flow import control_flow, graphs_of, prefixed
from quant2e.observers.base import OBSERVER_PREFIX, inner_observer
from quant2e.observers.given import has_given
from quant2e.observers.measuring import (
    HistogramObserver,
    PerChannelHistogramObserver,
    UniformQuantizationObserverBase,
)
from quant2e.ranges.search import check_method

FORMAT = 2
_READABLE = (1, FORMAT)
RECORD = "statistics.json"
_KIND = "quant2e statistics"
_FORMER_BUFFERS = ("peaks",)
"""What format 1 also holds, and nothing reads."""

SAMPLES = "quant2e_samples"
"""Key of a prepared graph's ``meta``: how many samples `calibrate` showed it, where that is known."""

_DIFFERENCE_LINES = 24


def observers_of(prepared: GraphModule) -> dict[str, Any]:
    """The observers of a prepared graph and its bodies by path, those inside fake-quantize modules instead of these."""
    return {
        prefixed(path, name): inner_observer(module)
        for path, graph in graphs_of(prepared)
        for name, module in graph.named_children()
        if name.startswith(OBSERVER_PREFIX)
    }


def measuring(prepared: GraphModule) -> dict[str, UniformQuantizationObserverBase[Any]]:
    """Those of `observers_of` that keep statistics of ours."""
    found = observers_of(prepared).items()
    return {name: observer for name, observer in found if isinstance(observer, UniformQuantizationObserverBase)}


def undecided(prepared: GraphModule) -> dict[str, UniformQuantizationObserverBase[Any]]:
    """Those of `measuring` whose statistics decide what becomes of a tensor: its encoding was not given."""
    return {name: o for name, o in measuring(prepared).items() if not has_given(prepared.get_submodule(name))}


def fingerprint(prepared: GraphModule) -> str:
    """The graph and what is observed on it, as text: one line per node, then one per observer.

    Numbers of bits and methods are left out: statistics serve all of them.
    """
    lines = [prefixed(path, _node_line(node)) for path, graph in graphs_of(prepared) for node in graph.graph.nodes]
    for name, observer in observers_of(prepared).items():
        estimator = getattr(observer, "estimator", None)
        lines.append(f"{name}: {type(observer).__name__ if estimator is None else estimator}")
    return "\n".join(lines)


def _node_line(node: Node) -> str:
    value = node.meta.get("val")
    shape = f" {str(value.dtype).removeprefix('torch.')}{_sizes(value)}" if isinstance(value, Tensor) else ""
    operands = ", ".join(operand.name for operand in node.all_input_nodes)
    flow = control_flow(node)
    target = node.target if flow is None else flow.op
    return f"{node.name} = {node.op} {target}({operands}){shape}"


def _sizes(value: Tensor) -> str:
    """Symbolic sizes get a common name: their numbering depends on the process."""
    return "[" + ", ".join(str(size) if type(size) is int else "?" for size in value.shape) + "]"


@dataclass(frozen=True, repr=False)
class Statistics:
    """Statistics of every observer of one prepared model.

    ``bound_to``: `fingerprint` of that model. ``states``: buffers by observer. ``constant``: observers of weights,
    whose statistics come from the model and not from data. ``estimators``: what made each state, of `ESTIMATORS`.
    ``batches``: how many batches were seen.

    Every state is one that its estimator can have made (`quant2e.calibration.plausibility`); what is not so raises
    `CalibrationError`.
    """

    bound_to: str
    states: Mapping[str, State]
    constant: frozenset[str]
    estimators: Mapping[str, str]
    batches: int = 0

    def __post_init__(self) -> None:
        if type(self.batches) is not int or self.batches < 0:
            raise CalibrationError(f"batches={self.batches!r}: a number of batches is 0 or more")
        if not isinstance(self.bound_to, str):
            raise CalibrationError(f"bound_to is the fingerprint of a model, not a {type(self.bound_to).__name__}")
        if set(self.states) != set(self.estimators) or not self.constant <= set(self.states):
            raise CalibrationError("states, estimators and constants are not of the same observers")
        for name, state in self.states.items():
            if (reason := implausible(self.estimators[name], state)) is not None:
                raise CalibrationError(f"the statistics of {name} cannot have been measured: {reason}")

    def __repr__(self) -> str:
        weights = len(self.constant)
        return (
            f"Statistics of {len(self.states) - weights} activations over {self.batches} "
            f"batch{'es' if self.batches != 1 else ''}, "
            f"and of {weights} constants"
        )

    @classmethod
    def of(cls, prepared: GraphModule, batches: int = 0) -> Statistics:
        """The present statistics of ``prepared``, copied.
        Raises `CalibrationError` when it has no observers of ours.
        """
        observers = measuring(prepared)
        if not observers and not observers_of(prepared):
            raise CalibrationError("this model has no observers, so there are no statistics: call prepare_pt2e on it")
        states = {
            name: {part: observer.get_buffer(part).detach().cpu().clone() for part in observer.statistics}
            for name, observer in observers.items()
        }
        constant = frozenset(name for name, observer in observers.items() if observer.frozen)
        estimators = {name: type(observer.estimator).__name__ for name, observer in observers.items()}
        return cls(fingerprint(prepared), states, constant, estimators, batches)

    def check_bound_to(self, prepared: GraphModule, origin: str = "these statistics") -> None:
        """Raise `CalibrationError`, with the difference, unless they were collected on a model like ``prepared``."""
        own, observers = fingerprint(prepared), measuring(prepared)
        if own != self.bound_to:
            raise CalibrationError(_difference(self.bound_to, own, origin, "this model"))
        if set(observers) != set(self.states):
            names = ", ".join(sorted(set(observers) ^ set(self.states))[:5])
            raise CalibrationError(f"{origin} are not of the observers of this model, which differ in {names}")
        values = observed_values(prepared)
        for name, observer in observers.items():
            if (reason := unfit(observer, values.get(name), self.estimators[name], self.states[name])) is not None:
                raise CalibrationError(f"{origin} do not fit {name} of this model: {reason}")
            if name in self.constant and observer.frozen and not _equal(self.states[name], observer):
                raise CalibrationError(
                    f"{origin} were collected with other weights: {name} saw the range "
                    f"{_extent(self.states[name])} there and {_extent(_buffers(observer))} here. Calibrate this model."
                )

    def restore(self, prepared: GraphModule, origin: str = "these statistics") -> GraphModule:
        """Put the statistics into the observers of ``prepared``, in place; returns it. Raises as `check_bound_to`."""
        self.check_bound_to(prepared, origin)
        prepared.meta.pop(SAMPLES, None)
        with torch.no_grad():
            for name, observer in measuring(prepared).items():
                put(observer, self.states[name])
        return prepared

    def merge(self, other: Statistics) -> Statistics:
        """What both saw together: exact, in any order. Raises `CalibrationError` for another model, or for moving
        averages, which depend on the order of the data.
        """
        if self.bound_to != other.bound_to:
            raise CalibrationError(_difference(self.bound_to, other.bound_to, "the first statistics", "the second"))
        if self.estimators != other.estimators or self.constant != other.constant:
            raise CalibrationError("the first statistics and the second are not of the same observers")
        merged = {}
        for name, state in self.states.items():
            if name in self.constant:
                merged[name] = state
                continue
            estimator = ESTIMATORS[self.estimators[name]]
            made = estimator.merge(_state(estimator, state), _state(estimator, other.states[name]))
            merged[name] = {part: getattr(made, part) for part in state}
        return replace(self, states=merged, batches=self.batches + other.batches)

    def save(self, path: str | Path) -> None:
        """Write a statistics file. It appears under ``path`` only when it is complete. Raises OSError."""
        record = {
            "kind": _KIND,
            "format": FORMAT,
            "bound_to": self.bound_to,
            "constant": sorted(self.constant),
            "estimators": dict(self.estimators),
            "batches": self.batches,
            "states": {name: list(state) for name, state in self.states.items()},
        }
        members = {RECORD: json.dumps(record).encode()}
        for name, state in self.states.items():
            for buffer, value in state.items():
                raw = io.BytesIO()
                np.lib.format.write_array(raw, value.numpy(), allow_pickle=False)
                members[_member(name, buffer)] = raw.getvalue()
        with atomic_file(Path(path)) as part:
            write_archive(part, members)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote. Raises `FileFormatError` for a file that is missing, damaged or of another kind, and
        for numbers that no observer can have measured.
        """
        source = Path(path)
        members = read_archive(source, "statistics file")
        if RECORD not in members:
            raise FileFormatError(f"{source} is no statistics file: it holds no {RECORD}")
        data = read_json(members.pop(RECORD), f"{RECORD} in {source}")
        if isinstance(data, dict) and data.get("kind") != _KIND:
            raise FileFormatError(f"{source} is no statistics file: its record is of another kind")
        of_format(data, _READABLE, f"the statistics file {source}")
        record = from_record(_Record, data, f"{RECORD} in {source}", besides=("format", "kind"))
        named = {_member(name, part): (name, part) for name, parts in record.states.items() for part in parts}
        if set(named) != set(members):
            raise FileFormatError(f"{source} is damaged: its record does not name the arrays that it holds")
        states: dict[str, dict[str, Tensor]] = {name: {} for name in record.states}
        for member, (name, part) in named.items():
            if part not in _FORMER_BUFFERS:
                states[name][part] = torch.from_numpy(read_array(members.pop(member), f"{member} in {source}"))
        # format 1 also says how each was configured, behind its name: ``Histogram(bins=2048, ...)``
        estimators = {name: text.partition("(")[0] for name, text in record.estimators.items()}
        try:
            return cls(record.bound_to, states, frozenset(record.constant), estimators, record.batches)
        except CalibrationError as error:
            raise FileFormatError(f"{source} is damaged: {error}") from error


@dataclass(frozen=True)
class _Record:
    """The JSON document of a statistics file, beside its kind and format; ``states``: buffers by observer."""

    bound_to: str
    constant: tuple[str, ...]
    estimators: Mapping[str, str]
    batches: int
    states: Mapping[str, tuple[str, ...]]


def _member(observer: str, buffer: str) -> str:
    return f"{observer}/{buffer}.npy"


def _state(estimator: Any, state: State) -> Any:
    return type(estimator.init())(**state)


def put(observer: UniformQuantizationObserverBase[Any], state: State) -> None:
    """Replace the statistics of an observer, in place."""
    for part, value in state.items():
        buffer = observer.get_buffer(part)
        if buffer.shape != value.shape:
            buffer.resize_(value.shape)
        buffer.copy_(value)


def _buffers(observer: UniformQuantizationObserverBase[Any]) -> State:
    return {part: observer.get_buffer(part) for part in observer.statistics}


def _equal(state: State, observer: UniformQuantizationObserverBase[Any]) -> bool:
    return all(torch.equal(state[part], value.cpu()) for part, value in _buffers(observer).items())


def _extent(state: State) -> str:
    if state["min_val"].numel() == 0:
        return "of no values"
    return f"[{float(state['min_val'].min()):g}, {float(state['max_val'].max()):g}]"


def _difference(a: str, b: str, name_a: str, name_b: str) -> str:
    lines = list(difflib.unified_diff(a.splitlines(), b.splitlines(), name_a, name_b, lineterm="", n=1))
    more = [] if len(lines) <= _DIFFERENCE_LINES else [f"... and {len(lines) - _DIFFERENCE_LINES} more lines"]
    shown = "\n".join(f"  {line}" for line in [*lines[:_DIFFERENCE_LINES], *more])
    return f"{name_a} belong to another model than {name_b}:\n{shown}"


def save_statistics(prepared: GraphModule, path: str | Path) -> None:
    """Save what the observers of a prepared model have seen; see `Statistics`. Raises `CalibrationError`, OSError."""
    Statistics.of(prepared).save(path)


def load_statistics(prepared: GraphModule, *paths: str | Path) -> GraphModule:
    """Put saved statistics into a prepared model, in place, instead of its own; of several files, merged.

    ``calibrate`` then adds to them. Returns ``prepared``. Raises `FileFormatError` for a file that cannot be read, and
    `CalibrationError` for statistics of another model (with the difference) or such as cannot be merged.
    """
    if not paths:
        raise CalibrationError("load_statistics(prepared, path, ...): name at least one statistics file")
    total: Statistics | None = None
    for path in paths:
        found = Statistics.load(path)
        found.check_bound_to(prepared, str(path))
        total = found if total is None else total.merge(found)
    assert total is not None
    return total.restore(prepared)


def rederive(
    prepared: GraphModule, *, method: str | None = None, bits: int | None = None, percentile: float | None = None
) -> GraphModule:
    """A copy of a calibrated model whose activations use another method or number of bits; no data is run.

    ``method``: see `search.METHODS`; it and ``percentile`` apply to histogram observers, of which there must be
    one. ``bits``: 2 to 16, at most those of the dtype; the integers are the middle ones of a signed dtype, the lowest
    ones of an unsigned one; weights keep theirs. The result equals a fresh calibration with these settings.
    """
    resolved = copy_graph(prepared)
    observers = {name: observer for name, observer in measuring(resolved).items() if not observer.frozen}
    histograms = [
        observer
        for observer in observers.values()
        if isinstance(observer, (HistogramObserver, PerChannelHistogramObserver))
    ]
    if (method is not None or percentile is not None) and not histograms:
        raise CalibrationError(
            "no activation has a histogram: calibrate with HistogramObserver to choose a method later"
        )
    for histogram in histograms:
        chosen = histogram.method if method is None else method
        wanted = histogram.percentile if percentile is None else percentile
        check_method(chosen, wanted)
        histogram.method, histogram.percentile = chosen, wanted
    if bits is not None:
        for observer in observers.values():
            observer.narrow(bits)
    return resolved
