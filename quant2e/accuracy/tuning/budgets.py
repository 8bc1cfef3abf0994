"""Budgets: what a program may cost at most, and the mixes that keep to it, as an integer program.

With x[g, p] = 1 where group g picks p:

    minimise    Σ loss·x    or    Σ work·x        subject to    Σ_p x[g, p] = 1,    Σ size·x ≤ size,
                Σ bits·x ≤ bits per weight · weights,    Σ macs·x ≥ share · MACs,    Σ loss·x ≤ bound

is solved to optimality (`scipy.optimize.milp`, by HiGHS), with losses and costs that were measured for each pick. A
latency is no sum over groups: it is measured for each trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from quant2e.accuracy.tuning.space.costs import Costs, Option
from quant2e.accuracy.tuning.space.frontier import Frontier
from quant2e.accuracy.tuning.space.space import Mix, Space
from quant2e.accuracy.tuning.space.trial import TuningTrial
from quant2e.errors import Quant2eError

_ROUNDING = 1.0 + 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a result must keep to, besides the goal for its metric; what is None may be anything.

    ``int8_share``: of the multiply-accumulates on int8, at least (0.95). ``size``: bytes of all tensors, as the graph
    holds them, at most. ``bits_per_weight``: mean over the weights that could be quantized, at most (without scales;
    a 4-bit weight counts 4). ``latency``: seconds, at most, as the function given as ``latency=`` measures them.

    Raises `Quant2eError` for numbers that cannot be.
    """

    int8_share: float | None = None
    size: float | None = None
    bits_per_weight: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0.0 < value < math.inf
            if value is not None and not number:
                raise Quant2eError(f"budget: {field.name}={value!r} is no number above 0")
        if self.int8_share is not None and self.int8_share > 1.0:
            raise Quant2eError(f"budget: int8_share={self.int8_share} is more than all, 1.0")

    @property
    def predictable(self) -> bool:
        """Whether something in it is a sum over groups."""
        return any(value is not None for value in (self.int8_share, self.size, self.bits_per_weight))

    def keeps(self, share: float, size: float, bits: float, latency: float | None) -> bool:
        """Whether these numbers are within the budget; a latency that was not measured is not."""
        return (
            (self.int8_share is None or share * _ROUNDING >= self.int8_share)
            and (self.size is None or size <= self.size * _ROUNDING)
            and (self.bits_per_weight is None or bits <= self.bits_per_weight * _ROUNDING)
            and (self.latency is None or (latency is not None and latency <= self.latency))
        )

    def holds(self, trial: TuningTrial) -> bool:
        """Whether a trial is within the budget."""
        return self.keeps(trial.int8_share, trial.size_bytes, trial.bits_per_weight, trial.latency)

    def __str__(self) -> str:
        told = [
            "" if self.int8_share is None else f"at least {self.int8_share:.1%} of MACs on int8",
            "" if self.size is None else f"at most {self.size:,.0f} bytes",
            "" if self.bits_per_weight is None else f"at most {self.bits_per_weight:g} bits a weight",
            "" if self.latency is None else f"at most {1e3 * self.latency:g} ms",
        ]
        return ", ".join(text for text in told if text) or "none"


def read_budget(budget: Any, latency: Any) -> Budget:
    """The budget that was given: none, a `Budget`, or its fields as a mapping. Raises `Quant2eError` for others."""
    known = [field.name for field in fields(Budget)]
    if isinstance(budget, Mapping):
        if unknown := [key for key in budget if key not in known]:
            raise Quant2eError(f"budget: {', '.join(map(repr, unknown))} is none of {', '.join(known)}")
        budget = Budget(**budget)
    found = Budget() if budget is None else budget
    if not isinstance(found, Budget):
        raise Quant2eError(f"budget is a {type(budget).__name__}: a quant2e.Budget, or a dict of {', '.join(known)}")
    if latency is not None and not callable(latency):
        raise Quant2eError(
            f"latency is a {type(latency).__name__}: a function of a QuantizedModel that returns seconds"
        )
    if found.latency is not None and latency is None:
        raise Quant2eError(
            "a budget for the latency needs latency=, a function of a QuantizedModel that returns seconds"
        )
    return found


class BudgetedFrontier(Frontier):
    """The frontier of the mixes within a budget. Raises `Quant2eError` when there are none."""

    def __init__(self, space: Space, costs: Costs, budget: Budget) -> None:
        self.budget = budget
        super().__init__(space, costs)
        cheapest = self._solved("work", math.inf)
        exact = self._solved("loss", math.inf)
        if cheapest is None or exact is None:
            raise Quant2eError(f"no mix is within the budget ({budget}); {self._reach()}")
        self.cheapest, self._exact = cheapest, exact

    def _reach(self) -> str:
        """How far the mixes go, in words."""
        picked = [[min(row.values(), key=lambda o: o.size) for row in rows] for rows in self.costs.options]
        size = min(self.costs.rest + sum(option.size for option in row) for row in picked)
        most = max(sum(max(o.macs for o in row.values()) for row in rows) for rows in self.costs.options)
        share = most / self.costs.macs if self.costs.macs else 0.0
        bits = min(sum(min(o.bits for o in row.values()) for row in rows) for rows in self.costs.options)
        mean = bits / self.costs.weights if self.costs.weights else 32.0
        return f"at best {share:.1%} of MACs are on int8, the least is {size:,.0f} bytes and {mean:.2f} bits a weight"

    def bounds(self) -> list[float]:
        """Those of all mixes that are within reach, down to the least loss."""
        least = self.costs.loss(self._exact)
        return [*(bound for bound in super().bounds() if bound > least), least]

    def within(self, bound: float) -> Mix:
        """The mix within the budget with the least work that is predicted to lose no more than ``bound``."""
        return self._solved("work", bound) or self._exact

    def prefix(self, count: int) -> Mix:
        """The cheapest mix within the budget that loses no more than what is left without the costliest groups."""
        bounds = self.bounds()
        return self.within(bounds[min(count, len(bounds) - 1)])

    def allowed(self, mix: Mix) -> bool:
        """Whether a mix is predicted to be within the budget."""
        costs = self.costs
        bits, latency = costs.bits_per_weight(mix), self.budget.latency
        return self.budget.keeps(costs.int8_share(mix), costs.size(mix), bits, latency)

    def _solved(self, objective: str, bound: float) -> Mix | None:
        """The best mix of any family by ``objective``; None where none is within budget and bound."""
        found = [mix for family in self._families if (mix := self._of_family(family, objective, bound)) is not None]
        return min(found, key=getattr(self.costs, objective), default=None)

    def _of_family(self, family: int, objective: str, bound: float) -> Mix | None:
        optimize = _scipy_optimize()
        rows = self.costs.options[family]
        places = [(group, pick) for group, row in enumerate(rows) for pick in row]
        options = [rows[group][pick] for group, pick in places]
        one_each = np.array([[float(g == group) for g, _ in places] for group in range(len(rows))])
        constraints = [optimize.LinearConstraint(one_each, 1.0, 1.0)]
        for values, low, high in self._limits(options, bound):
            scale = max(1e-30, *map(abs, values))
            constraints.append(optimize.LinearConstraint(np.array([values]) / scale, low / scale, high / scale))
        goal = np.array([getattr(option, objective) for option in options])
        tie = np.array([option.loss + option.work for option in options])
        target = goal / max(float(goal.max()), 1e-30) + 1e-6 * tie / max(float(tie.max()), 1e-30)
        solved = optimize.milp(
            target, constraints=constraints, integrality=np.ones(len(places)), bounds=optimize.Bounds(0.0, 1.0)
        )
        if solved.x is None:
            return None
        picks = {group: pick for (group, pick), x in zip(places, solved.x, strict=True) if x > 0.5}
        return Mix(family, tuple(picks[group] for group in range(len(rows))))

    def _limits(self, options: list[Option], bound: float) -> Iterator[tuple[list[float], float, float]]:
        """Coefficients, and their sum's least and largest value, of each limit."""
        budget, costs = self.budget, self.costs
        if budget.int8_share is not None:
            yield [float(o.macs) for o in options], budget.int8_share * costs.macs / _ROUNDING, math.inf
        if budget.size is not None:
            yield [o.size for o in options], -math.inf, budget.size - costs.rest
        if budget.bits_per_weight is not None:
            yield [o.bits for o in options], -math.inf, budget.bits_per_weight * costs.weights * _ROUNDING
        if bound < math.inf:
            yield [o.loss for o in options], -math.inf, bound * _ROUNDING


def _scipy_optimize() -> Any:
    try:
        import scipy.optimize
    except ImportError as error:
        raise Quant2eError(
            "a budget is solved by scipy, which is not installed: pip install 'quant2e[tune]'"
        ) from error
    return scipy.optimize
