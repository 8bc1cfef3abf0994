"""Search: trials one after the other, until the strategy has found what it looks for, or a limit is reached."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from quant2e.accuracy.tuning.budgets import Budget
from quant2e.accuracy.tuning.result import INTERRUPTED, TuningResult
from quant2e.accuracy.tuning.space.candidates import Candidates
from quant2e.accuracy.tuning.space.evaluation import Evaluate, latency_of, metric_of, no_metric, told
from quant2e.accuracy.tuning.space.goal import Goal
from quant2e.accuracy.tuning.space.space import FLOAT_PICK, Mix
from quant2e.accuracy.tuning.space.trial import TuningTrial
from quant2e.accuracy.tuning.store import TrialStore
from quant2e.accuracy.tuning.strategies import Strategy
from quant2e.errors import Quant2eError
from quant2e.quantized_model import QuantizedModel

TrialProgress = Callable[[TuningTrial], None]
"""Called with each trial that is finished."""

Latency = Callable[[QuantizedModel], float]
"""Measures a quantized model on its target, lowered however the user wants: seconds of one call."""

_WAIT = 0.3
"""Seconds between two looks at a shared store when other processes try all that is worth a trial."""


@dataclass(slots=True, kw_only=True)
class Search:
    """``until``: a time of ``time.monotonic`` after which no trial begins; ``failure``: the last one of a trial.

    The other fields are what `quant2e.tune` was given, and made of it.
    """

    strategy: Strategy
    candidates: Candidates
    goal: Goal
    budget: Budget
    evaluate: Evaluate
    latency: Latency | None
    store: TrialStore
    max_trials: int | None
    until: float
    progress: TrialProgress | None
    failure: Exception | None = None

    def run(self) -> str:
        """Make trials; returns why no further one was made, in words."""
        try:
            return self._run()
        except KeyboardInterrupt:
            if not self.store.finished():
                raise
            return INTERRUPTED

    def finished(self) -> Mapping[Mix, TuningTrial]:
        """Finished trials, those of earlier and other processes too, by this goal and this budget."""
        return {mix: self._judged(trial) for mix, trial in self.store.finished().items()}

    def _run(self) -> str:
        while True:
            finished = self.finished()
            proposals = self.strategy.propose(finished)
            if not proposals:
                return "the search is complete"
            if self.max_trials is not None and len(finished) >= self.max_trials:
                return f"stopped after max_trials={self.max_trials}"
            if finished and time.monotonic() >= self.until:
                return "stopped by the timeout"
            claimed = self.store.claim(proposals)
            if claimed is None:
                time.sleep(_WAIT)
                continue
            self._try(*claimed)

    def _try(self, number: int, mix: Mix) -> None:
        try:
            trial = self._judged(self._tried(number, mix))
        except BaseException:
            self.store.abandon(number)
            raise
        self.store.finish(trial)
        if self.progress is not None:
            self.progress(trial)

    def _judged(self, trial: TuningTrial) -> TuningTrial:
        within = self.budget.holds(trial)
        return replace(trial, within_budget=within, met=within and self.goal.is_met(trial.metric))

    def _tried(self, number: int, mix: Mix) -> TuningTrial:
        begun, costs = time.monotonic(), self.strategy.frontier.costs
        model = self.candidates.model(mix)
        metric, latency, error = None, None, ""
        try:
            metric = metric_of(self.evaluate, model.module)
            latency = None if self.latency is None else latency_of(self.latency, model)
        except Exception as failure:  # noqa: BLE001 - a model that collapsed may make a metric fail; it is told
            self.failure = failure
            error = told(failure)
        why = "" if metric is None else no_metric(metric, higher_is_better=self.goal.higher_is_better)
        if why:
            metric, error = None, why
        return TuningTrial(
            number=number,
            mix=mix,
            metric=metric,
            met=False,
            within_budget=False,
            left_float=self.candidates.space.left_float(mix),
            int8_share=model.report.int8_mac_share,
            size_bytes=model.report.quantized_bytes or 0,
            bits_per_weight=costs.bits_per_weight(mix),
            work=costs.work(mix),
            latency=latency,
            seconds=time.monotonic() - begun,
            error=error,
        )

    def result(self, strategy: str, stopped: str) -> TuningResult:
        """The best of the finished trials, with its model. Raises `Quant2eError` when none has a metric but those in
        which everything is float: that keeps any goal, and says nothing.
        """
        trials = tuple(sorted(self.finished().values(), key=lambda trial: trial.number))
        quantized = [trial for trial in trials if set(trial.mix.picks) != {FLOAT_PICK}]
        if all(trial.failed for trial in quantized or trials):
            last = f": {quantized[-1].error}" if quantized else ""
            raise Quant2eError(
                f"evaluate failed on each of {len(quantized)} quantized models, though not on the float one{last}"
            ) from self.failure
        best = best_of([trial for trial in trials if not trial.failed], self.goal)
        model = self.candidates.measured(self.candidates.model(best.mix), best.mix)
        groups = self.candidates.space.families[best.mix.family].groups
        return TuningResult(
            model=model,
            best=best,
            goal=self.goal,
            budget=self.budget,
            trials=trials,
            choices={
                op: pick
                for group, pick in zip(groups, best.mix.picks, strict=True)
                for op in group.ops
                if pick != FLOAT_PICK
            },
            strategy=strategy,
            stopped=stopped,
            notes=(*self.strategy.frontier.costs.notes, *_failures(trials)),
        )


def _failures(trials: Sequence[TuningTrial]) -> tuple[str, ...]:
    """That functions of the user failed, with what the last one said; nothing where none did."""
    failed = [trial for trial in trials if trial.error]
    return (f"{len(failed)} of {len(trials)} trials failed: {failed[-1].error}",) if failed else ()


def best_of(trials: list[TuningTrial], goal: Goal) -> TuningTrial:
    """The cheapest that keeps the goal; where none does, the one with the best metric, within the budget if any is."""

    def lost(trial: TuningTrial) -> float:
        return math.inf if trial.metric is None else goal.drop(trial.metric)

    met = [trial for trial in trials if trial.met]
    if met:
        return min(met, key=lambda trial: (trial.work, lost(trial)))
    return min(trials, key=lambda trial: (not trial.within_budget, lost(trial), trial.work))
