"""The store of trials: which choices were tried, by this process or by others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from quant2e.accuracy.tuning.space.space import Mix
from quant2e.accuracy.tuning.space.trial import TuningTrial


class TrialStore(ABC):
    """Where trials are kept. A mix is claimed before it is evaluated, so that nobody else evaluates it as well."""

    @abstractmethod
    def finished(self) -> Mapping[Mix, TuningTrial]:
        """Finished trials by mix, in the order in which they began."""

    @abstractmethod
    def claim(self, choices: Sequence[Mix]) -> tuple[int, Mix] | None:
        """The first of ``choices`` that nobody tries, with the number of its trial; None when others try all."""

    @abstractmethod
    def finish(self, trial: TuningTrial) -> None:
        """Keep a trial that was claimed."""

    @abstractmethod
    def float_metric(self, measure: Callable[[], float]) -> float:
        """The metric of the float model: what it is known to be, else ``measure()``."""

    @abstractmethod
    def abandon(self, number: int) -> None:
        """Give a claimed mix back, untried."""


class MemoryStore(TrialStore):
    """Trials of one process, for as long as it runs."""

    def __init__(self) -> None:
        self._trials: dict[Mix, TuningTrial] = {}

    def finished(self) -> Mapping[Mix, TuningTrial]:
        return self._trials

    def claim(self, choices: Sequence[Mix]) -> tuple[int, Mix] | None:
        return len(self._trials), choices[0]

    def finish(self, trial: TuningTrial) -> None:
        self._trials[trial.mix] = trial

    def float_metric(self, measure: Callable[[], float]) -> float:
        return measure()

    def abandon(self, number: int) -> None:
        """Nobody else waits for it."""
