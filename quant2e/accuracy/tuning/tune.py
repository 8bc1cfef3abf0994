"""Tuning in one call: a model, a quantizer and the user's metric in; the cheapest model that keeps the metric out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from quant2e.accuracy.tuning.candidates import Candidates, alternatives_of
from quant2e.accuracy.tuning.costs import MEASURED_ON, measured_costs
from quant2e.accuracy.tuning.evaluation import Evaluate, float_metric_of, metric_of
from quant2e.accuracy.tuning.families import space_of
from quant2e.accuracy.tuning.frontier import Frontier
from quant2e.accuracy.tuning.goal import Goal, check_drop
from quant2e.accuracy.tuning.result import TuningResult
from quant2e.accuracy.tuning.space import FLOAT_PICK, Mix
from quant2e.accuracy.tuning.store import MemoryStore, TrialStore
from quant2e.accuracy.tuning.strategies import STRATEGIES, Strategy
from quant2e.accuracy.tuning.trial import TuningTrial
from quant2e.annotation.quantizer import Quantizer
from quant2e.calibration.batches import check_iterable
from quant2e.calibration.feed import Feed, Transform
from quant2e.errors import Quant2eError
from quant2e.graph.captured.calls import example_call
from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.dynamic_batch import with_dynamic_batch
from quant2e.graph.captured.dynamic_shapes import of_graph, read_dynamic_shapes

TuningStrategy = Literal["sensitivity", "bisect", "mse", "exhaustive"]

TrialProgress = Callable[[TuningTrial], None]
"""Called with each trial that is finished."""


def tune(
    model: nn.Module | ExportedProgram | GraphModule,
    example_inputs: Any,
    quantizer: Quantizer | Mapping[str, Quantizer],
    calibration_data: Iterable[Any] | None,
    evaluate: Evaluate,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    dynamic_batch: bool | int = False,
    transform: Transform | None = None,
    max_drop: float = 0.01,
    relative: bool = True,
    higher_is_better: bool = True,
    strategy: TuningStrategy = "sensitivity",
    max_trials: int | None = None,
    timeout: float | None = None,
    progress: TrialProgress | None = None,
) -> TuningResult:
    """The cheapest mix of precisions that keeps the user's metric.

    ``model``, ``example_inputs``, ``calibration_data``, ``kwargs``, ``dynamic_shapes``, ``dynamic_batch`` and
    ``transform`` are as for `quant2e.quantize`; the model is captured once, calibrated once, and left as it is.
    ``quantizer``: any quantizer, whose ops are then quantized or left float, group by group (ops that are fused, or
    share a scale or a weight, are one group); or several by name, between which each group may choose as well.
    ``evaluate``: a function of a model, called like the float one, that returns its metric, a number; it is called with
    the float model and then with a quantized one for each trial, in evaluation mode, without gradients and with the
    same random numbers.

    ``max_drop``: how much of the float model's metric may be lost: a share of it, or, not ``relative``, so many units.
    ``higher_is_better``: False for losses and errors. ``strategy``: in which order mixes are tried, see docs/tuning.md.
    ``max_trials``, ``timeout`` (in seconds): no further trial is begun then; the best so far is returned, as it is
    after Ctrl-C. ``progress``: called with each finished trial.

    Raises `Quant2eError` for arguments that do not fit together, where nothing is quantized, where the float model
    cannot be evaluated and where no trial could, and the errors of capture, prepare, calibrate and convert.
    """
    quantizers = _checked(quantizer, evaluate, max_drop, strategy, max_trials, timeout)
    if calibration_data is not None:
        check_iterable(calibration_data, "calibration_data")
    example = example_call(example_inputs, kwargs)
    if dynamic_batch is not False:
        example, dynamic_shapes = with_dynamic_batch(model, example, dynamic_batch, dynamic_shapes)
    captured = capture(model, *example, dynamic_shapes=dynamic_shapes)
    data = None if calibration_data is None else Feed(calibration_data, captured, "calibration", transform)
    alternatives = alternatives_of(captured, quantizers, data, example)
    given = dynamic_shapes is not None
    candidates = Candidates(
        captured=captured,
        space=space_of(alternatives),
        quantizers={name: type(one).__name__ for name, one in quantizers.items()},
        example=example,
        dynamic_shapes=of_graph(dynamic_shapes, model, *example) if given else read_dynamic_shapes(captured),
        notes=() if data is None else data.notes,
    )
    goal = Goal(
        float_metric=float_metric_of(evaluate, candidates.float_model()),
        max_drop=float(max_drop),
        relative=relative,
        higher_is_better=higher_is_better,
    )
    calls = alternatives[0].held_out.calls[:MEASURED_ON]
    costs = measured_costs(candidates.space, calls, STRATEGIES[strategy].loss)
    search = _Search(
        strategy=STRATEGIES[strategy](Frontier(candidates.space, costs)),
        candidates=candidates,
        goal=goal,
        evaluate=evaluate,
        store=MemoryStore(),
        max_trials=max_trials,
        until=math.inf if timeout is None else time.monotonic() + timeout,
        progress=progress,
    )
    stopped = search.run()
    return _result(search, strategy, stopped)


def _checked(
    quantizer: Any, evaluate: Any, max_drop: Any, strategy: Any, max_trials: Any, timeout: Any
) -> Mapping[str, Quantizer]:
    """The quantizers by name, once all arguments were looked at."""
    if not callable(evaluate):
        raise Quant2eError(f"evaluate is a {type(evaluate).__name__}: a function of a model that returns its metric")
    check_drop(max_drop)
    if strategy not in get_args(TuningStrategy):
        raise Quant2eError(f"strategy={strategy!r}: one of {', '.join(get_args(TuningStrategy))}")
    whole = isinstance(max_trials, int) and not isinstance(max_trials, bool) and max_trials >= 1
    if max_trials is not None and not whole:
        raise Quant2eError(f"max_trials={max_trials!r}: a whole number, at least one; leave it out for no limit")
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout > 0
    if timeout is not None and not number:
        raise Quant2eError(f"timeout={timeout!r}: a number of seconds above 0; leave it out for no limit")
    if not isinstance(quantizer, Mapping):
        return {type(quantizer).__name__: quantizer}
    if not quantizer:
        raise Quant2eError("quantizer is an empty mapping: give at least one quantizer by name")
    for name in quantizer:
        if not isinstance(name, str) or name in {FLOAT_PICK, ""}:
            raise Quant2eError(f"{name!r} cannot name a quantizer: a word other than '{FLOAT_PICK}'")
    return dict(quantizer)


@dataclass(slots=True, kw_only=True)
class _Search:
    """Trials, until the strategy has found what it looks for or a limit is reached."""

    strategy: Strategy
    candidates: Candidates
    goal: Goal
    evaluate: Evaluate
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
            return "interrupted"

    def _run(self) -> str:
        done = 0
        while True:
            finished = self.store.finished()
            if self.max_trials is not None and done >= self.max_trials:
                return f"stopped after max_trials={self.max_trials}"
            if done and time.monotonic() >= self.until:
                return "stopped by the timeout"
            proposals = self.strategy.propose(finished)
            if not proposals:
                return "the search is complete"
            claimed = self.store.claim(proposals)
            if claimed is None:
                continue
            self._try(*claimed)
            done += 1

    def _try(self, number: int, mix: Mix) -> None:
        begun = time.monotonic()
        try:
            trial = self._tried(number, mix, begun)
        except BaseException:
            self.store.abandon(number)
            raise
        self.store.finish(trial)
        if self.progress is not None:
            self.progress(trial)

    def _tried(self, number: int, mix: Mix, begun: float) -> TuningTrial:
        costs = self.strategy.frontier.costs
        model = self.candidates.model(mix)
        metric, error = None, ""
        try:
            metric = metric_of(self.evaluate, model.module)
        except Exception as failure:  # noqa: BLE001 - a model that collapsed may make a metric fail; it is told
            self.failure = failure
            error = f"{type(failure).__name__}: {failure}"
        if metric is not None and math.isnan(metric):
            metric, error = None, "evaluate returned NaN"
        return TuningTrial(
            number=number,
            mix=mix,
            metric=metric,
            met=self.goal.is_met(metric),
            within_budget=True,
            left_float=self.candidates.space.left_float(mix),
            int8_share=model.report.int8_mac_share,
            size_bytes=model.report.quantized_bytes or 0,
            bits_per_weight=costs.bits_per_weight(mix),
            work=costs.work(mix),
            seconds=time.monotonic() - begun,
            error=error,
        )


def _result(search: _Search, strategy: str, stopped: str) -> TuningResult:
    trials = tuple(search.store.finished().values())
    evaluated = [trial for trial in trials if not trial.failed]
    if not evaluated:
        raise Quant2eError(
            f"evaluate failed on each of {len(trials)} quantized models, though not on the float one; the last time "
            f"with {trials[-1].error}"
        ) from search.failure
    best = _best(evaluated, search.goal)
    candidates = search.candidates
    model = candidates.measured(candidates.model(best.mix), best.mix)
    groups = candidates.space.families[best.mix.family].groups
    picks = {
        op: pick for group, pick in zip(groups, best.mix.picks, strict=True) for op in group.ops if pick != FLOAT_PICK
    }
    return TuningResult(
        model=model,
        best=best,
        goal=search.goal,
        trials=trials,
        choices=picks,
        strategy=strategy,
        stopped=stopped,
        notes=search.strategy.frontier.costs.notes,
    )


def _best(trials: list[TuningTrial], goal: Goal) -> TuningTrial:
    """The cheapest that keeps the goal; where none does, the one with the best metric, within the budget if any is."""

    def worse(trial: TuningTrial) -> float:
        return math.inf if trial.metric is None else goal.drop(trial.metric)

    met = [trial for trial in trials if trial.met]
    if met:
        return min(met, key=lambda trial: (trial.work, worse(trial)))
    return min(trials, key=lambda trial: (not trial.within_budget, worse(trial), trial.work))
