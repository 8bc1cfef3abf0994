"""Sampling strategies, "random" and "bayesian": the samplers of Optuna, asked for the next mixes.

The sampler is made anew for each answer from the finished trials, so that it has no state of its own: what counts is in
the store of trials. It minimises the work of mixes that keep the goal; others count as dearer than everything, and the
more so the more they lose. "bayesian" is the tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quant2e.accuracy.tuning.optuna_import import optuna_module, without_optuna_log
from quant2e.accuracy.tuning.space.frontier import Frontier
from quant2e.accuracy.tuning.space.goal import Goal
from quant2e.accuracy.tuning.space.space import Mix, Space
from quant2e.accuracy.tuning.space.trial import TuningTrial
from quant2e.accuracy.tuning.strategies import Strategy, Trials

SAMPLES = 64
"""Trials of a sampling strategy that was given no ``max_trials``."""

_DRAWN = 4
"""Mixes drawn for one answer: as many processes find something to do."""

_ATTEMPTS = 100
"""Draws after which a space counts as searched, when all of them were tried before."""


def parameters_of(space: Space, mix: Mix) -> dict[str, Any]:
    """A mix as parameters of an Optuna trial: the family, and the pick of each of its groups."""
    groups = space.families[mix.family].groups
    return {"family": mix.family, **{f"{mix.family}.{g.name}": p for g, p in zip(groups, mix.picks, strict=True)}}


def distributions_of(space: Space, family: int) -> dict[str, Any]:
    """What the parameters of a mix of this family may be."""
    categorical = optuna_module().distributions.CategoricalDistribution
    groups = space.families[family].groups
    return {
        "family": categorical(tuple(range(len(space.families)))),
        **{f"{family}.{group.name}": categorical(group.choices) for group in groups},
    }


def score_of(trial: TuningTrial, goal: Goal) -> float:
    """What is minimised: the work of a mix that keeps the goal; 10 and the part of the metric that others lose."""
    if trial.met:
        return trial.work
    if trial.metric is None or trial.failed:
        return 30.0
    lost = goal.drop(trial.metric) / max(abs(goal.float_metric), 1e-12)
    return 10.0 + min(max(lost, 0.0), 10.0)


class SamplingStrategy(Strategy):
    """Begins with the cheapest mix, then asks the sampler."""

    def __init__(self, frontier: Frontier, goal: Goal, *, most: int | None = None, seed: int = 0) -> None:
        super().__init__(frontier, goal)
        self._most = SAMPLES if most is None else math.inf  # whoever counts trials stops the search
        self._seed = seed

    def sampler(self, seed: int) -> Any:
        """Optuna's sampler."""
        return optuna_module().samplers.RandomSampler(seed=seed)

    def propose(self, done: Trials) -> Sequence[Mix]:
        if len(done) >= self._most:
            return ()
        if self.frontier.cheapest not in done:
            return (self.frontier.cheapest, *self._drawn(done, _DRAWN - 1))
        return tuple(self._drawn(done, _DRAWN))

    def _drawn(self, done: Trials, count: int) -> Iterator[Mix]:
        optuna, space = optuna_module(), self.frontier.space
        with without_optuna_log():
            study = optuna.create_study(sampler=self.sampler(self._seed + len(done)))
            for mix, trial in done.items():
                parameters, choices = parameters_of(space, mix), distributions_of(space, mix.family)
                value = score_of(trial, self.goal)
                study.add_trial(optuna.create_trial(params=parameters, distributions=choices, value=value))
            seen: set[Mix] = set()
            for _ in range(_ATTEMPTS):
                mix = self._asked(study)
                if mix not in done and mix not in seen and self.frontier.allowed(mix):
                    seen.add(mix)
                    yield mix
                if len(seen) == count:
                    return

    def _asked(self, study: Any) -> Mix:
        space = self.frontier.space
        trial = study.ask()
        family = trial.suggest_categorical("family", tuple(range(len(space.families))))
        names: Mapping[str, Sequence[str]] = {f"{family}.{g.name}": g.choices for g in space.families[family].groups}
        return Mix(family, tuple(trial.suggest_categorical(name, tuple(picks)) for name, picks in names.items()))


class BayesianStrategy(SamplingStrategy):
    """The tree-structured Parzen estimator."""

    def sampler(self, seed: int) -> Any:
        return optuna_module().samplers.TPESampler(seed=seed)
