"""Strategies: which mix to try next, as functions of what the trials so far found.

A strategy is asked again after each trial and answers with the choices that are worth a trial now, the most wanted
first, and with none when it is done. It keeps nothing between two answers, so a run that was killed goes on where it
was, and several processes that see the same trials take different ones of the same answer.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from quant2e.accuracy.tuning.space.costs import Loss
from quant2e.accuracy.tuning.space.frontier import Frontier
from quant2e.accuracy.tuning.space.goal import Goal
from quant2e.accuracy.tuning.space.space import Mix
from quant2e.accuracy.tuning.space.trial import TuningTrial
from quant2e.errors import Quant2eError

Trials = Mapping[Mix, TuningTrial]
"""Finished trials by mix."""

_HEAVY = 0.05
"""A share of the model's work that is worth a trial although it is predicted to fail, by no more than `_DOUBT`."""

_DOUBT = 4.0
"""6 dB: what a predicted loss is trusted to."""

MOST_COMBINATIONS = 1024
"""Choices that strategy ``"exhaustive"`` is willing to try."""


class Strategy(ABC):
    """``loss``: where it wants errors to be measured."""

    loss: ClassVar[Loss] = "output"

    def __init__(self, frontier: Frontier, goal: Goal) -> None:
        self.frontier = frontier
        self.goal = goal

    @abstractmethod
    def propose(self, done: Trials) -> Sequence[Mix]:
        """Choices that are worth a trial, the most wanted first; none when nothing is left to find."""


def _new(choices: Iterator[Mix] | Sequence[Mix], done: Trials) -> list[Mix]:
    return [mix for mix in dict.fromkeys(choices) if mix not in done]


class _Ladder:
    """The first rung that keeps the goal, of rungs that become better and dearer; by doubling, then by halving."""

    def __init__(self, rungs: Sequence[Mix], done: Trials) -> None:
        self._rungs = rungs
        self._done = done

    def _met(self, rung: int) -> bool | None:
        trial = self._done.get(self._rungs[rung])
        return None if trial is None else trial.met

    def bracket(self) -> tuple[int, int | None]:
        """The last rung known to fail below the first known to keep the goal (-1: none), and that one (None: none)."""
        met = next((rung for rung in range(len(self._rungs)) if self._met(rung)), None)
        end = len(self._rungs) if met is None else met
        failed = max((rung for rung in range(end) if self._met(rung) is False), default=-1)
        return failed, met

    def doubling(self) -> list[int]:
        """Rungs worth a trial while none is known to keep the goal: one, two, four … further."""
        failed, last = self.bracket()[0], len(self._rungs) - 1
        steps = (failed + max(1, failed) * 2**step for step in range(last.bit_length() + 1))
        return list(dict.fromkeys(min(rung, last) for rung in steps if failed < last))

    def halving(self) -> list[int]:
        """Rungs worth a trial between one that fails and one that keeps the goal: the middle, then the quarters."""
        failed, met = self.bracket()
        last = len(self._rungs) if met is None else met
        middle = (failed + last) // 2
        found = [middle, (failed + middle) // 2, (middle + last) // 2]
        return [rung for rung in dict.fromkeys(found) if failed < rung < last]


class SensitivityStrategy(Strategy):
    """Greedy by measured cost: the frontier is walked until the goal is kept, then single groups are put back.

    Rung k of the walk spends least of all choices that lose no more than what is left when the k costliest groups are
    float. Then a group is put back where the prediction allows it; one that holds 5 % of the work is also tried where
    the prediction misses by no more than 6 dB.
    """

    def __init__(self, frontier: Frontier, goal: Goal) -> None:
        super().__init__(frontier, goal)
        self._rungs = list(dict.fromkeys(map(frontier.within, frontier.bounds())))

    def propose(self, done: Trials) -> Sequence[Mix]:
        rungs, ladder = self._rungs, _Ladder(self._rungs, done)
        failed, met = ladder.bracket()
        if met is None:
            return _new([rungs[rung] for rung in ladder.doubling()], done)
        if met - failed > 1:
            return _new([rungs[rung] for rung in ladder.halving()], done)
        return _new(self._put_back(done), done)

    def _put_back(self, done: Trials) -> Iterator[Mix]:
        costs = self.frontier.costs
        best = min((trial for trial in done.values() if trial.met), key=lambda trial: trial.work)
        missed = [costs.loss(trial.mix) for trial in done.values() if not trial.met]
        bound = min(missed, default=float("inf"))
        for index, pick, saved in self.frontier.cheaper(best.mix):
            mix = best.mix.with_pick(index, pick)
            if self.frontier.allowed(mix) and costs.loss(mix) < bound * (_DOUBT if saved >= _HEAVY else 1.0):
                yield mix


class BisectStrategy(Strategy):
    """Halving over the order of costs: the fewest groups, from the costliest on, that must be float."""

    def __init__(self, frontier: Frontier, goal: Goal) -> None:
        super().__init__(frontier, goal)
        self._rungs = list(dict.fromkeys(map(frontier.prefix, range(len(frontier.order) + 1))))

    def propose(self, done: Trials) -> Sequence[Mix]:
        rungs, ladder = self._rungs, _Ladder(self._rungs, done)
        if rungs[0] not in done:
            return _new([rungs[0], *(rungs[rung] for rung in ladder.halving())], done)
        return _new([rungs[rung] for rung in ladder.halving()], done) or self._last(rungs, ladder, done)

    def _last(self, rungs: Sequence[Mix], ladder: _Ladder, done: Trials) -> Sequence[Mix]:
        return _new(rungs[-1:], done) if ladder.bracket()[1] is None else ()


class MseStrategy(Strategy):
    """As Neural Compressor's: groups become float one by one, those with the largest own error first."""

    loss = "own"

    def __init__(self, frontier: Frontier, goal: Goal) -> None:
        super().__init__(frontier, goal)
        self._rungs = list(dict.fromkeys(map(frontier.prefix, range(len(frontier.order) + 1))))

    def propose(self, done: Trials) -> Sequence[Mix]:
        return () if any(trial.met for trial in done.values()) else _new(self._rungs, done)


class ExhaustiveStrategy(Strategy):
    """Every mix, the cheapest first. Raises `Quant2eError`, with the count, when there are too many."""

    def __init__(self, frontier: Frontier, goal: Goal) -> None:
        super().__init__(frontier, goal)
        count = frontier.space.size
        if count > MOST_COMBINATIONS:
            groups = sum(len(family.groups) for family in frontier.space.families)
            raise Quant2eError(
                f"strategy='exhaustive' would try {count:,} choices for {groups} groups of ops, and takes no more "
                f"than {MOST_COMBINATIONS:,}: use strategy='sensitivity', or a quantizer that covers fewer ops"
            )
        choices = (
            Mix(number, picks)
            for number, family in enumerate(frontier.space.families)
            for picks in itertools.product(*(group.choices for group in family.groups))
        )
        self._choices = sorted(filter(frontier.allowed, choices), key=frontier.costs.work)

    def propose(self, done: Trials) -> Sequence[Mix]:
        return _new(self._choices, done)


STRATEGIES: Mapping[str, type[Strategy]] = {
    "sensitivity": SensitivityStrategy,
    "bisect": BisectStrategy,
    "mse": MseStrategy,
    "exhaustive": ExhaustiveStrategy,
}
