"""Range selection: per tensor, the candidate range with the least output error on held-out batches.

The error of a tensor says little about what its consumers make of it: a few large values may carry the result, or mean
nothing. So every candidate is judged behind the ops that read the tensor: their outputs, computed from the quantized
tensor and everything else in float, against float. The graph runs once per batch, and each consumer once more per
candidate: about as many forwards as there are candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from quant2e.calibration.batches import SomeBatches, check_batch, check_iterable
from quant2e.calibration.feed import Feed
from quant2e.calibration.statistics import undecided
from quant2e.errors import CalibrationError, where
from quant2e.graph.captured.inputs import flat_inputs
from quant2e.graph.captured.module import independent_copy
from quant2e.graph.control_flow import GraphInterpreter, prefixed
from quant2e.graph.effects import is_random, writes
from quant2e.isolation import IsolatedRandomness
from quant2e.observers.base import is_observer_call, observed
from quant2e.observers.measuring import HistogramObserver
from quant2e.ranges.qparams import fake_quantize_per_tensor
from quant2e.ranges.sqnr import sqnr_db
from quant2e.report.chosen_range import ChosenRange
from quant2e.report.plain_data import plain_data
from quant2e.stages import stage

CANDIDATES: tuple[tuple[str, float], ...] = (("mse", 99.99), ("minmax", 99.99), ("percentile", 99.99))
"""Method and percentile of each; the first wins ties."""

_CLEARLY = 0.98
"""A candidate displaces an earlier one only with less than this part of its error: held-out data is a sample."""


@dataclass(frozen=True, slots=True, repr=False)
class RangeChoice:
    """One tensor: the mean relative squared error of its consumers' outputs, per candidate (method, percentile)."""

    observer: str
    tensor: str
    errors: Mapping[tuple[str, float], float]

    @property
    def winner(self) -> tuple[str, float]:
        """The candidate with the smallest error."""
        best = next(iter(self.errors))
        for candidate, error in self.errors.items():
            if error < self.errors[best] * _CLEARLY:
                best = candidate
        return best

    @property
    def sqnr(self) -> float:
        """SQNR in dB of the winner, behind the ops that read the tensor."""
        return sqnr_db(1.0, self.errors[self.winner])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the winner, its SQNR in dB, and the error of each candidate."""
        method, percentile = self.winner
        errors = [{"method": m, "percentile": p, "error": plain_data(error)} for (m, p), error in self.errors.items()]
        winner = {"method": method, "percentile": percentile, "sqnr_db": plain_data(self.sqnr)}
        return {"observer": self.observer, "tensor": self.tensor, "winner": winner, "candidates": errors}

    def __repr__(self) -> str:
        return f"RangeChoice({self})"

    def __str__(self) -> str:
        errors = ", ".join(f"{method} {sqnr_db(1.0, error):.1f} dB" for (method, _), error in self.errors.items())
        return f"{self.tensor}: {self.winner[0]} ({errors})"


@dataclass(slots=True)
class _CandidateRange:
    """Parameters of one or more candidates, and their error so far."""

    scale: float
    zero_point: int
    error: float = 0.0


@dataclass(slots=True)
class _CandidateRanges:
    """The candidate ranges of one observer; those with equal parameters are compared once."""

    observer: HistogramObserver
    by_method: Mapping[tuple[str, float], _CandidateRange]
    distinct: tuple[_CandidateRange, ...]
    judged: int = 0
    tensor: str = ""


@stage("choose ranges")
def select_ranges(prepared: GraphModule, batches: Iterable[Any]) -> tuple[RangeChoice, ...]:
    """Give every histogram observer of ``prepared``, in place, the best of `CANDIDATES` and say how they fared.

    ``batches``: held-out data, in any form that `calibrate` takes. An observer with another method than "mse", the
    default, keeps what its author chose. Observers without data, those whose candidates agree, and those of points
    whose encodings were given are left alone.
    Raises `CalibrationError` when ``batches`` is empty, or one brings NaN or +inf to an observed tensor.
    """
    check_iterable(batches, "the held-out data")
    observers = {name: ranges for name, o in undecided(prepared).items() if (ranges := _ranges_of(o)) is not None}
    if not observers:
        return ()
    graph = independent_copy(prepared)
    runner = _Comparison(graph, observers)
    randomness = IsolatedRandomness()
    done = 0
    for batch in Feed(batches, prepared, "held-out"):
        place = f"calibration batch {batches.place(done)}" if isinstance(batches, SomeBatches) else ""
        runner.batch = place or f"held-out batch {done}"
        call = check_batch(batch, runner.batch, prepared)
        with torch.no_grad(), randomness:
            runner.run(*flat_inputs(graph, call.copied()), enable_io_processing=False)
        done += 1
    if done == 0:
        raise CalibrationError("range selection needs at least one held-out batch")
    return tuple(_finish(name, ranges) for name, ranges in observers.items() if ranges.judged)


def _finish(name: str, ranges: _CandidateRanges) -> RangeChoice:
    errors = {method: candidate.error / ranges.judged for method, candidate in ranges.by_method.items()}
    result = RangeChoice(name, ranges.tensor, errors)
    ranges.observer.method, ranges.observer.percentile = result.winner
    return result


def ranges_of(choices: Sequence[RangeChoice]) -> tuple[ChosenRange, ...]:
    """The choices as a report keeps them, those first whose tensors lose most."""
    rows = (ChosenRange(one.tensor, *one.winner, one.sqnr) for one in choices)
    return tuple(sorted(rows, key=lambda row: row.sqnr_db))


def _ranges_of(observer: Any) -> _CandidateRanges | None:
    if not isinstance(observer, HistogramObserver) or observer.frozen or not observer.observed or observer.marks_never:
        return None
    if observer.method != CANDIDATES[0][0] or observer.nan_count or observer.posinf_count:
        return None
    own = observer.method, observer.percentile
    made: dict[tuple[float, int], _CandidateRange] = {}
    by_method = {}
    for method in CANDIDATES:
        observer.method, observer.percentile = method
        scale, zero_point = observer.calculate_qparams()
        key = float(scale), int(zero_point)
        by_method[method] = made.setdefault(key, _CandidateRange(*key))
    observer.method, observer.percentile = own
    return _CandidateRanges(observer, by_method, tuple(made.values())) if len(made) > 1 else None


class _Comparison(GraphInterpreter):
    """Runs the observed graph in float; what reads a tensor with candidate ranges runs once more per candidate.

    ``path``: of a body, in the program; ``outer``: the comparison of the graph that it is in.
    """

    def __init__(
        self,
        graph: GraphModule,
        observers: Mapping[str, _CandidateRanges],
        path: str = "",
        outer: _Comparison | None = None,
    ) -> None:
        super().__init__(graph)
        self._observers, self._path, self._outer = observers, path, outer
        self._repeats = False
        self.batch: str = "" if outer is None else outer.batch

    def inside(self, path: str, body: GraphModule) -> Interpreter:
        """The comparison in a body."""
        return _Comparison(body, self._observers, prefixed(self._path, path), self)

    @property
    def repeats(self) -> bool:
        """Whether the graph runs for a candidate of a graph that it is in: its own are not compared then."""
        return self._repeats or (self._outer is not None and self._outer.repeats)

    def _ranges(self, call: Node) -> _CandidateRanges | None:
        return self._observers.get(prefixed(self._path, str(call.target)))

    def run_node(self, n: Node) -> Any:
        """The float value of ``n``."""
        if is_observer_call(n):
            value = self.env[n.all_input_nodes[0]]
            if self.repeats:
                return value
            self._check(n, value)
            ranges = self._ranges(n)
            if ranges is not None and any(user.op != "call_function" for user in n.users):
                for candidate, quantized in _quantized(ranges, value):
                    _judge(candidate, [value], [quantized])
                _count(ranges, n)
            return value
        result = super().run_node(n)
        if n.op == "call_function" and not self.repeats and not writes(n) and not is_random(n):
            for operand in n.all_input_nodes:
                ranges = self._ranges(operand) if is_observer_call(operand) else None
                if ranges is not None:
                    self._run_candidates(n, operand, ranges, result)
        return result

    def _check(self, call: Node, value: Tensor) -> None:
        if bool((torch.isnan(value) | torch.isposinf(value)).any()):
            raise CalibrationError(
                f"{self.batch} brings NaN or +inf to the output of {where(observed(call))}: "
                "no range can be compared on it; look at that batch and at the model"
            )

    def _run_candidates(self, n: Node, operand: Node, ranges: _CandidateRanges, result: Any) -> None:
        wanted = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not wanted:
            return
        value = self.env[operand]
        for candidate, quantized in _quantized(ranges, value):
            self.env[operand], self._repeats = quantized, True
            try:
                again = super().run_node(n)
            finally:
                self.env[operand], self._repeats = value, False
            leaves = pytree.tree_leaves(again)
            _judge(candidate, wanted, [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()])
        _count(ranges, operand)


def _count(ranges: _CandidateRanges, call: Node) -> None:
    ranges.tensor = ranges.tensor or f"the output of {where(observed(call))}"
    ranges.judged += 1


def _quantized(ranges: _CandidateRanges, value: Tensor) -> Iterator[tuple[_CandidateRange, Tensor]]:
    grid = ranges.observer.grid
    for candidate in ranges.distinct:
        made = fake_quantize_per_tensor(
            value, candidate.scale, candidate.zero_point, grid.quant_min, grid.quant_max, grid.dtype
        )
        yield candidate, made.to(value.dtype)


def _judge(candidate: _CandidateRange, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    """Add the relative squared error: every consumer and batch counts the same, whatever its scale."""
    signal = noise = 0.0
    for a, b in zip(wanted, got, strict=True):
        finite = torch.isfinite(a)
        exact = torch.where(finite, a, 0.0).double()
        signal += float(exact.square().sum())
        noise += float((torch.where(finite, b, 0.0).double() - exact).square().sum())
    candidate.error += noise / signal if signal > 0 else noise
