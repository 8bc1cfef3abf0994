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

from quant2e.calibration.calibrate import IsolatedRandomness
from quant2e.calibration.statistics import measuring
from quant2e.errors import CalibrationError, where
from quant2e.graph.captured.inputs import flat_inputs
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.effects import is_random, writes
from quant2e.graph.mutation import own_written_tensors
from quant2e.observers.base import OBSERVER_PREFIX
from quant2e.observers.measuring import HistogramObserver
from quant2e.ranges.qparams import fake_quantize_per_tensor
from quant2e.ranges.sqnr import sqnr_db
from quant2e.report.plain_data import plain_data

CANDIDATES: tuple[tuple[str, float], ...] = (("mse", 99.99), ("minmax", 99.99), ("percentile", 99.99))
"""Method and percentile of each; the first wins ties."""

COLLAPSED_DB = 6.0
"""Output SQNR below which more than a quarter of an op's output power is noise: worth a word."""

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
class _Entrant:
    """Parameters of one or more candidates, and their error so far."""

    scale: float
    zero_point: int
    error: float = 0.0


@dataclass(slots=True)
class _Track:
    """One observer's race: candidates with equal parameters run once."""

    observer: HistogramObserver
    candidates: Mapping[tuple[str, float], _Entrant]
    entrants: tuple[_Entrant, ...]
    judged: int = 0
    tensor: str = ""


def select_ranges(prepared: GraphModule, batches: Iterable[Any]) -> tuple[RangeChoice, ...]:
    """Give every histogram observer of ``prepared``, in place, the best of `CANDIDATES` and say how they fared.

    ``batches``: held-out data, in any form that `calibrate` takes. An observer with another method than "mse", the
    default, keeps what its author chose. Observers without data, and those whose candidates agree, do not race. Raises
    `CalibrationError` when ``batches`` is empty.
    """
    tracks = {name: track for name, o in measuring(prepared).items() if (track := _track(o)) is not None}
    if not tracks:
        return ()
    graph = copy_graph(prepared)
    own_written_tensors(graph)
    runner = _Racing(graph, tracks)
    randomness = IsolatedRandomness()
    done = 0
    for batch in batches:
        with torch.no_grad(), randomness:
            runner.run(*flat_inputs(graph, batch), enable_io_processing=False)
        done += 1
    if done == 0:
        raise CalibrationError("racing needs at least one held-out batch")
    return tuple(_finish(name, track) for name, track in tracks.items() if track.judged)


def _finish(name: str, track: _Track) -> RangeChoice:
    errors = {candidate: entrant.error / track.judged for candidate, entrant in track.candidates.items()}
    result = RangeChoice(name, track.tensor, errors)
    track.observer.method, track.observer.percentile = result.winner
    return result


def collapsed(choices: Sequence[RangeChoice]) -> list[str]:
    """A sentence for every tensor that no candidate serves: more than a quarter of what is made of it is noise."""
    return [
        f"{one.tensor}: what is computed from it keeps only {one.sqnr:.1f} dB with the best of {len(one.errors)} "
        "ranges; leave it float, or give it more bits"
        for one in choices
        if one.sqnr < COLLAPSED_DB
    ]


def _track(observer: Any) -> _Track | None:
    if not isinstance(observer, HistogramObserver) or observer.frozen or not observer.observed:
        return None
    if observer.method != CANDIDATES[0][0] or observer.nan_count or observer.posinf_count:
        return None
    own = observer.method, observer.percentile
    made: dict[tuple[float, int], _Entrant] = {}
    candidates = {}
    for candidate in CANDIDATES:
        observer.method, observer.percentile = candidate
        scale, zero_point = observer.calculate_qparams()
        key = float(scale), int(zero_point)
        candidates[candidate] = made.setdefault(key, _Entrant(*key))
    observer.method, observer.percentile = own
    return _Track(observer, candidates, tuple(made.values())) if len(made) > 1 else None


class _Racing(Interpreter):
    """Runs the observed graph in float; what reads a racing tensor runs once more per candidate."""

    def __init__(self, graph: GraphModule, tracks: Mapping[str, _Track]) -> None:
        super().__init__(graph)
        self._tracks = tracks

    def run_node(self, n: Node) -> Any:
        """The float value of ``n``."""
        if _is_observer(n):
            value = self.env[n.all_input_nodes[0]]
            track = self._tracks.get(str(n.target))
            if track is not None and any(user.op != "call_function" for user in n.users):
                for entrant, quantized in _quantized(track, value):
                    _judge(entrant, [value], [quantized])
                _count(track, n)
            return value
        result = super().run_node(n)
        if n.op == "call_function" and not writes(n) and not is_random(n):
            for operand in n.all_input_nodes:
                track = self._tracks.get(str(operand.target)) if _is_observer(operand) else None
                if track is not None:
                    self._run_candidates(n, operand, track, result)
        return result

    def _run_candidates(self, n: Node, operand: Node, track: _Track, result: Any) -> None:
        wanted = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not wanted:
            return
        value = self.env[operand]
        for entrant, quantized in _quantized(track, value):
            self.env[operand] = quantized
            try:
                again = super().run_node(n)
            finally:
                self.env[operand] = value
            leaves = pytree.tree_leaves(again)
            _judge(entrant, wanted, [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()])
        _count(track, operand)


def _is_observer(node: Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(OBSERVER_PREFIX)


def _count(track: _Track, call: Node) -> None:
    source = call.all_input_nodes[0]
    while _is_observer(source):
        source = source.all_input_nodes[0]
    track.tensor = track.tensor or f"the output of {where(source)}"
    track.judged += 1


def _quantized(track: _Track, value: Tensor) -> Iterator[tuple[_Entrant, Tensor]]:
    grid = track.observer.grid
    for entrant in track.entrants:
        made = fake_quantize_per_tensor(
            value, entrant.scale, entrant.zero_point, grid.quant_min, grid.quant_max, grid.dtype
        )
        yield entrant, made.to(value.dtype)


def _judge(entrant: _Entrant, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    """Add the relative squared error: every consumer and batch counts the same, whatever its scale."""
    signal = noise = 0.0
    for a, b in zip(wanted, got, strict=True):
        finite = torch.isfinite(a)
        exact = torch.where(finite, a, 0.0).double()
        signal += float(exact.square().sum())
        noise += float((torch.where(finite, b, 0.0).double() - exact).square().sum())
    entrant.error += noise / signal if signal > 0 else noise
