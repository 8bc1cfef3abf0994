"""Driver: runs algorithms one after the other, each on a copy, and keeps those that held-out data shows to help.

captured ─ step ─ step ─▶ prepare, calibrate ─ step ─ step ─▶ convert

A step is measured as the user will have it: the whole graph quantized, its output against the float model's, on batches
that neither calibration nor any algorithm has seen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.float_graphs import drop_observers
from quant2e.accuracy.output_error import outputs_of, powers
from quant2e.accuracy.output_loss import converted_sqnr
from quant2e.annotation.quantizer import Quantizer
from quant2e.calibration.calibrate import Progress
from quant2e.calibration.held_out import HeldOutData
from quant2e.calibration.repeated_data import RepeatedData
from quant2e.convert.convert import converted_graph
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import independent_copy
from quant2e.graph.control_flow import graphs_of, prefixed
from quant2e.isolation import IsolatedRandomness
from quant2e.observers.base import is_observer_call
from quant2e.prepare.prepare import prepare_pt2e
from quant2e.report.algorithm_step import KEPT, NO_EFFECT, NOT_TRIED, ROLLED_BACK, AlgorithmStep
from quant2e.report.record import record_of
from quant2e.report.report import DYNAMIC, STATIC, WEIGHT_ONLY, Report
from quant2e.stages import stage

ROUNDING = 0.6
"""An exact step may move the float result by this power of the resolution of its dtype: 83 dB in float32."""


def always(_: GraphModule) -> str:
    """No reason not to try: of an algorithm that was asked for by name."""
    return ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """An algorithm that is to be tried. ``unless``: the reason not to, on a prepared graph; empty: there is none."""

    algorithm: Algorithm
    unless: Callable[[GraphModule], str] = always


@dataclass(frozen=True, slots=True)
class Mended:
    """A captured graph and the calibrated one that was made of it, after all steps; both compute what they did."""

    captured: GraphModule
    prepared: GraphModule
    held_out: HeldOutData
    steps: tuple[AlgorithmStep, ...] = ()


@dataclass(slots=True)
class Driver:
    """Runs attempts on ``captured``, which is left as it is.

    ``enough_db``: SQNR in dB of the output from which nothing more is tried.
    """

    captured: GraphModule
    quantizer: Quantizer
    data: RepeatedData
    enough_db: float = math.inf
    steps: list[AlgorithmStep] = field(default_factory=list)

    def run(self, prepared: GraphModule, attempts: Sequence[Attempt], progress: Progress | None = None) -> Mended:
        """Those of the captured stage in their order, then those of the calibrated stage.

        ``prepared``: made of the captured graph by the quantizer; it is calibrated in place. Raises the errors of
        calibration and conversion without any algorithm; those of a step roll it back.
        """
        early = [one for one in attempts if one.algorithm.stage is Stage.CAPTURED]
        late = [one for one in attempts if one.algorithm.stage is Stage.CALIBRATED]
        captured, calibrated = self.captured, self.data.complete or not early
        held_out = (self.data.calibrate if calibrated else self.data.calibrate_on_some)(prepared, progress)
        sqnr = self._sqnr(prepared, held_out.calls)
        for attempt in early:
            captured, prepared, held_out, sqnr = self._captured(attempt, captured, prepared, held_out, sqnr)
        if not calibrated:
            prepared = prepare_pt2e(captured, self.quantizer)
            held_out = self.data.calibrate(prepared, progress)
            sqnr = self._sqnr(prepared, held_out.calls) if late else sqnr
        for attempt in late:
            prepared, sqnr = self._calibrated(attempt, prepared, held_out, sqnr)
        return Mended(captured, prepared, held_out, tuple(self.steps))

    def _captured(
        self, attempt: Attempt, captured: GraphModule, prepared: GraphModule, held_out: HeldOutData, before: float
    ) -> tuple[GraphModule, GraphModule, HeldOutData, float]:
        """One step on the captured graph, and what it makes of the calibrated one; all as they were, where it fails."""
        as_it_was = captured, prepared, held_out, before
        if self._left_out(attempt, prepared, before):
            return as_it_was
        candidate = copy.deepcopy(captured)
        with stage(f"algorithm {attempt.algorithm.name}"):
            changes = self._applied(attempt.algorithm, candidate, held_out.calls)
        if changes is None:
            return as_it_was
        try:
            again = prepare_pt2e(candidate, self.quantizer)
            held_out = self.data.calibrate_on_some(again)
            after = self._sqnr(again, held_out.calls)
        except Exception as error:  # noqa: BLE001 - reported, and the step is rolled back
            self._roll_back(attempt, changes, f"its result cannot be quantized: {_short(error)}")
            return as_it_was
        if fewer := _fewer_quantized(prepared, again):
            self._roll_back(attempt, changes, fewer)
            return as_it_was
        return (candidate, again, held_out, after) if self._judged(attempt, changes, before, after) else as_it_was

    def _calibrated(
        self, attempt: Attempt, prepared: GraphModule, held_out: HeldOutData, before: float
    ) -> tuple[GraphModule, float]:
        """One step on the calibrated graph; it and its SQNR as they were, where it fails."""
        if self._left_out(attempt, prepared, before):
            return prepared, before
        candidate = copy.deepcopy(prepared)
        with stage(f"algorithm {attempt.algorithm.name}"):
            changes = self._applied(attempt.algorithm, candidate, held_out.calls)
        if changes is None:
            return prepared, before
        try:
            after = self._sqnr(candidate, held_out.calls)
            missing = _observers(prepared) - _observers(candidate)
        except Exception as error:  # noqa: BLE001 - reported, and the step is rolled back
            self._roll_back(attempt, changes, f"its result cannot be converted: {_short(error)}")
            return prepared, before
        if missing:
            self._roll_back(attempt, changes, f"it removes observers, and what they saw stays float: {min(missing)}")
            return prepared, before
        return (candidate, after) if self._judged(attempt, changes, before, after) else (prepared, before)

    def _left_out(self, attempt: Attempt, prepared: GraphModule, before: float) -> bool:
        reason = attempt.unless(prepared)
        if before >= self.enough_db:
            reason = f"the output keeps {before:.1f} dB, and {self.enough_db:g} dB are enough"
        if reason:
            self.steps.append(AlgorithmStep(attempt.algorithm.name, NOT_TRIED, reason=reason))
        return bool(reason)

    def _applied(
        self, algorithm: Algorithm, candidate: GraphModule, held_out: Sequence[Call]
    ) -> tuple[str, ...] | None:
        """What an algorithm changed in ``candidate``; None where nothing is to be kept of it."""
        context = Context(self.quantizer, tuple(call.copied() for call in self.data.calls), self._prepare)
        try:
            with IsolatedRandomness():
                changes = tuple(map(str, algorithm.apply(candidate, context)))
            candidate.graph.lint()
            candidate.recompile()
            wrong = self._not_exact(candidate, held_out) if changes and algorithm.exact else ""
        except Exception as error:  # noqa: BLE001 - reported, and the step is rolled back
            self.steps.append(AlgorithmStep(algorithm.name, ROLLED_BACK, reason=f"it failed: {_short(error)}"))
            return None
        if not changes:
            self.steps.append(AlgorithmStep(algorithm.name, NO_EFFECT, reason="it found nothing to change"))
            return None
        if wrong:
            self.steps.append(AlgorithmStep(algorithm.name, ROLLED_BACK, changes, wrong))
            return None
        return changes

    def _judged(self, attempt: Attempt, changes: tuple[str, ...], before: float, after: float) -> bool:
        """Whether a step is kept; either way it is reported."""
        kept = after >= before
        reason = "" if kept else "the held-out error grows"
        if kept and not self.data.separate:
            reason = "measured on what it learned from: there is no other data"
        outcome = KEPT if kept else ROLLED_BACK
        self.steps.append(AlgorithmStep(attempt.algorithm.name, outcome, changes, reason, before, after))
        return kept

    def _roll_back(self, attempt: Attempt, changes: tuple[str, ...], reason: str) -> None:
        self.steps.append(AlgorithmStep(attempt.algorithm.name, ROLLED_BACK, changes, reason))

    def _prepare(self, captured: GraphModule) -> GraphModule:
        """A captured graph, prepared by the quantizer and calibrated on what algorithms may look at."""
        prepared = prepare_pt2e(captured, self.quantizer)
        self.data.calibrate_on_calls(prepared)
        return prepared

    def _sqnr(self, prepared: GraphModule, calls: Sequence[Call]) -> float:
        return converted_sqnr(self.captured, prepared, converted_graph(prepared), calls)[0]

    def _not_exact(self, candidate: GraphModule, calls: Sequence[Call]) -> str:
        """How far the float result of a rewritten graph is from the model's, in words; empty where that is rounding."""
        graph = independent_copy(candidate)
        drop_observers(body for _, body in graphs_of(graph))
        return float_difference(independent_copy(self.captured), graph, calls)


def _fewer_quantized(before: GraphModule, after: GraphModule) -> str:
    """That less work is quantized than before, in words: what is left float has no error. Empty where it is not so."""
    for kinds, words in (((STATIC, DYNAMIC), "on int8"), ((STATIC, DYNAMIC, WEIGHT_ONLY), "on quantized weights")):
        was, now = (_share(record_of(graph).report, kinds) for graph in (before, after))
        if now < was - _SHARE_ROUNDING:
            return f"it leaves ops float: {now:.1%} of the multiply-accumulates {words}, and {was:.1%} without it"
    return ""


_SHARE_ROUNDING = 1e-6


def _observers(prepared: GraphModule) -> frozenset[str]:
    """Paths of the observers that a prepared graph and its bodies call."""
    return frozenset(
        prefixed(path, str(node.target))
        for path, graph in graphs_of(prepared)
        for node in graph.graph.nodes
        if is_observer_call(node)
    )


def _share(report: Report, kinds: Sequence[str]) -> float:
    total = sum(v.op.macs for v in report.verdicts)
    return sum(v.op.macs for v in report.verdicts if v.kind in kinds) / total if total else 0.0


def float_difference(reference: Callable[..., object], candidate: Callable[..., object], calls: Sequence[Call]) -> str:
    """How the outputs of two float graphs differ by more than rounding; empty where they do not.

    Each output counts for itself: the power of its difference is held against its own power, or, where that is zero,
    against that of as many ones. Other outputs than floats must be equal, but for one in a thousand, where a comparison
    may tip.
    """
    ours, theirs = IsolatedRandomness(), IsolatedRandomness()
    for index, call in enumerate(calls):
        pairs = zip(outputs_of(reference, call, ours), outputs_of(candidate, call, theirs), strict=True)
        for place, (a, b) in enumerate(pairs):
            if isinstance(a, Tensor) and not _close(a, b):
                return f"it changes the float result: output {place} of held-out batch {index}{_apart(a, b)}"
    return ""


def _close(a: Tensor, b: object) -> bool:
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return bool((a != b).sum() * 1000 <= a.numel())
    signal, noise = powers(a, b)
    eps = torch.finfo(a.dtype).eps
    return bool(noise <= (eps ** (2 * ROUNDING) * signal if signal else eps**2 * a.numel()))


def _apart(a: Tensor, b: object) -> str:
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return " has another shape or dtype"
    if not a.is_floating_point():
        return f" has {int((a != b).sum())} other values of {a.numel()}"
    signal, noise = powers(a, b)
    relative = math.sqrt(noise / signal) if signal else math.inf
    return f" is off by {relative:.1e} of its size"


_LONGEST = 200
"""Characters of an error that a report shows."""


def _short(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 2].rstrip() + " …"
