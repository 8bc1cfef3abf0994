"""Tuning in one call: a model, a quantizer and the user's metric in; the cheapest model that keeps the metric out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.ladder import attempts_of
from quant2e.accuracy.algorithms.registry import Algorithms
from quant2e.accuracy.tuning.alternatives import alternatives_of, mended_name
from quant2e.accuracy.tuning.budgets import Budget, BudgetedFrontier, read_budget
from quant2e.accuracy.tuning.fingerprints import fingerprints
from quant2e.accuracy.tuning.optuna_import import optuna_module
from quant2e.accuracy.tuning.result import TuningResult
from quant2e.accuracy.tuning.sampling import BayesianStrategy, SamplingStrategy
from quant2e.accuracy.tuning.search import Latency, Search, TrialProgress
from quant2e.accuracy.tuning.shared_store import SharedStore
from quant2e.accuracy.tuning.space.candidates import Candidates
from quant2e.accuracy.tuning.space.costs import MEASURED_ON, measured_costs
from quant2e.accuracy.tuning.space.evaluation import Evaluate, float_metric_of
from quant2e.accuracy.tuning.space.families import space_of
from quant2e.accuracy.tuning.space.frontier import Frontier
from quant2e.accuracy.tuning.space.goal import Goal, check_drop
from quant2e.accuracy.tuning.space.space import FLOAT_PICK
from quant2e.accuracy.tuning.store import MemoryStore, TrialStore
from quant2e.accuracy.tuning.strategies import STRATEGIES, Strategy
from quant2e.accuracy.tuning.table import TrialTable
from quant2e.annotation.quantizer import Quantizer
from quant2e.calibration.batches import check_iterable
from quant2e.calibration.feed import Feed, Transform
from quant2e.errors import Quant2eError
from quant2e.graph.captured.capture import capture_call
from quant2e.observers.measuring import searchable
from quant2e.ranges.search import searched_together
from quant2e.stages import heard, quiet_progress, quiet_where_told, shown

TuningStrategy = Literal["sensitivity", "bisect", "mse", "bayesian", "random", "exhaustive"]


@quiet_where_told
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
    algorithms: Algorithms | Mapping[str, Algorithms] = (),
    budget: Budget | Mapping[str, float] | None = None,
    latency: Latency | None = None,
    max_trials: int | None = None,
    timeout: float | None = None,
    storage: Any = None,
    study: str = "quant2e",
    seed: int = 0,
    progress: TrialProgress | bool | None = None,
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
    ``higher_is_better``: False for losses and errors. ``strategy``: in which order mixes are tried, see docs/tuning.md;
    ``seed``: of those that draw. ``algorithms``: what may mend a quantized model, as for `quant2e.quantize`, or several
    lists by name: each is one more way to quantize, beside those without. ``budget``: what the result must keep to
    besides, a `Budget` or its fields as a dict. ``latency``: measures a quantized model on its target, in seconds, for
    each trial.
    ``max_trials``, ``timeout`` (in seconds): no further trial is begun then; the best so far is returned, as it is
    after Ctrl-C. ``storage``: the path of a journal file, the URL of a database, or a storage of Optuna, where trials
    are kept under the name ``study``: a run that was killed goes on from there, and any number of processes, each
    calling this function with the same arguments, share the work; ``max_trials`` counts those of all. ``progress``: a
    function of each finished trial; None shows a table on a terminal, False nothing.

    Raises `Quant2eError` for arguments that do not fit together, where nothing is quantized, where the float model
    cannot be evaluated and where no trial could, where no mix is within the budget, for a storage with trials of
    something else, and the errors of capture, prepare, calibrate and convert.
    """
    begun = time.monotonic()
    limits = read_budget(budget, latency)
    quantizers = _checked(quantizer, evaluate, max_drop, strategy, max_trials, timeout)
    lists = _lists(algorithms, quantizers)
    if strategy in {"bayesian", "random"} or storage is not None:
        optuna_module()
    if calibration_data is not None:
        check_iterable(calibration_data, "calibration_data")
    captured, example, shapes = capture_call(model, example_inputs, kwargs, dynamic_shapes, dynamic_batch)
    data = None if calibration_data is None else Feed(calibration_data, captured, "calibration", transform)
    alternatives = alternatives_of(captured, quantizers, data, example, lists)
    candidates = Candidates(
        captured=captured,
        space=space_of(alternatives),
        example=example,
        dynamic_shapes=shapes,
        notes=() if data is None else data.notes,
    )
    calls = alternatives[0].held_out.calls[:MEASURED_ON]
    costs = measured_costs(candidates.space, calls, _STRATEGIES[strategy].loss)
    limited = limits.predictable
    frontier = BudgetedFrontier(candidates.space, costs, limits) if limited else Frontier(candidates.space, costs)
    store: TrialStore = MemoryStore()
    if storage is not None:
        store = SharedStore(storage, study, fingerprints(captured, alternatives), candidates.space)
    goal = Goal(
        float_metric=store.float_metric(lambda: float_metric_of(evaluate, candidates.float_model())),
        max_drop=float(max_drop),
        relative=relative,
        higher_is_better=higher_is_better,
    )
    if isinstance(store, SharedStore):
        store.judge_by(goal)
    searched = searchable(module for alternative in alternatives for module in alternative.prepared.modules())
    with _shown(progress) as told, searched_together(searched):  # ranges do not change, so they are searched once
        search = Search(
            strategy=_made(strategy, frontier, goal, max_trials, seed),
            candidates=candidates,
            goal=goal,
            budget=limits,
            evaluate=evaluate,
            latency=latency,
            store=store,
            max_trials=max_trials,
            until=math.inf if timeout is None else begun + timeout,
            progress=told,
        )
        stopped = search.run()
    return search.result(strategy, stopped)


def _lists(algorithms: Any, quantizers: Mapping[str, Quantizer]) -> dict[str, Algorithms]:
    """Lists of algorithms by name; every one is looked at before any work."""
    found = dict(algorithms) if isinstance(algorithms, Mapping) else {"mended": algorithms} if algorithms else {}
    taken = {*quantizers, FLOAT_PICK}
    for name, asked in found.items():
        called = [mended_name(quantizer, name, quantizers) for quantizer in quantizers]
        if name in taken or not taken.isdisjoint(called):
            raise Quant2eError(f"'{name}' names a list of algorithms and something else: give it another name")
        taken.update(called)
        attempts_of(asked)
    return found


_STRATEGIES: Mapping[str, type[Strategy]] = {**STRATEGIES, "bayesian": BayesianStrategy, "random": SamplingStrategy}


def _made(strategy: str, frontier: Frontier, goal: Goal, most: int | None, seed: int) -> Strategy:
    kind = _STRATEGIES[strategy]
    if issubclass(kind, SamplingStrategy):
        return kind(frontier, goal, most=most, seed=seed)
    return kind(frontier, goal)


@contextmanager
def _shown(progress: TrialProgress | bool | None) -> Iterator[TrialProgress | None]:
    """What is told of each trial: by the user's function, by a table on a terminal, or by nobody."""
    if progress is None and not shown():
        yield None
    elif progress is None or progress is True:
        with quiet_progress(), TrialTable() as table:  # one thing at a time on the terminal
            yield table
    elif isinstance(progress, TrialTable):
        with progress:
            yield progress
    else:
        yield heard(progress)


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
