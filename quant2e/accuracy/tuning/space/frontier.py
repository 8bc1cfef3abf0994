"""The frontier: for each bound on the predicted loss, the mix that spends least.

    minimise  Σ work(group, pick)     subject to     Σ loss(group, pick) ≤ bound

is a knapsack problem with a pick from each group. Its Lagrangian, Σ work + λ·loss, falls apart into a minimum for each
group; a sweep over λ gives all choices on the convex hull (Everett, Operations Research 11, 1963), and what the bound
leaves over is spent on the groups that save most. That is within one group of the best; budgets are solved exactly
(`quant2e.accuracy.tuning.budgets`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quant2e.accuracy.tuning.space.costs import Costs, Option
from quant2e.accuracy.tuning.space.space import FLOAT_PICK, Mix, Space

_ROUNDING = 1.0 + 1e-9

_FILLED = 4
"""Choices of the hull, the cheapest that a bound allows, on which the rest of the bound is spent."""


class Frontier:
    """Choices by predicted loss and work.

    ``order``: places of the groups in the first family, those with the largest loss of their cheapest pick first.
    """

    def __init__(self, space: Space, costs: Costs) -> None:
        self.space = space
        self.costs = costs
        hull = sorted(dict.fromkeys(self._sweep()), key=self._rank)
        self._hull = [(mix, costs.loss(mix)) for mix in hull]
        self.cheapest = min((self._minimum(family, 0.0) for family in self._families), key=self._rank)
        losses = [costs.options[self.cheapest.family][i][p].loss for i, p in enumerate(self.cheapest.picks)]
        self.order = sorted(range(len(losses)), key=lambda index: -losses[index])
        self._losses = losses

    @property
    def _families(self) -> range:
        return range(len(self.space.families))

    def _rank(self, mix: Mix) -> tuple[float, float]:
        return self.costs.work(mix), self.costs.loss(mix)

    def bounds(self) -> list[float]:
        """Predicted losses with none, one, two … of the costliest groups left float, down to nothing quantized."""
        left = sum(self._losses)
        found = [left]
        for index in self.order:
            left -= self._losses[index]
            found.append(max(left, 0.0))
        return [*found[:-1], 0.0]

    def prefix(self, count: int) -> Mix:
        """The cheapest mix with the ``count`` groups float that cost most."""
        mix = self.cheapest
        for index in self.order[:count]:
            mix = mix.with_pick(index, FLOAT_PICK)
        return mix

    def allowed(self, mix: Mix) -> bool:
        """Whether a mix may be tried: every one may, where there is no budget."""
        return True

    def within(self, bound: float) -> Mix:
        """The mix with the least work that is predicted to lose no more than ``bound``."""
        allowed = bound * _ROUNDING
        feasible = [mix for mix, loss in self._hull if loss <= allowed][:_FILLED]
        feasible += [] if feasible else [self.space.all_float(family) for family in self._families]
        return min((self._filled(mix, allowed) for mix in feasible), key=self._rank)

    def _sweep(self) -> Iterator[Mix]:
        for family in self._families:
            for exponent in range(-36, 37):
                yield self._minimum(family, 10.0 ** (exponent / 4.0))

    def _minimum(self, family: int, weight: float) -> Mix:
        """The pick of each group with the least work + weight · loss; the first named of equal ones."""

        def price(option: Option) -> tuple[float, float]:
            return option.work + weight * option.loss, option.loss

        options = self.costs.options[family]
        return Mix(family, tuple(min(row, key=lambda pick: price(row[pick])) for row in options))

    def _filled(self, mix: Mix, bound: float) -> Mix:
        """Spend what the bound leaves over on the picks that save most work."""
        loss = self.costs.loss(mix)
        for index, pick, saved in self.cheaper(mix):
            now = self.costs.options[mix.family][index]
            more = now[pick].loss - now[mix.picks[index]].loss
            if saved > 0.0 and now[pick].work < now[mix.picks[index]].work and loss + more <= bound:
                mix, loss = mix.with_pick(index, pick), loss + more
        return mix

    def cheaper(self, mix: Mix) -> Sequence[tuple[int, str, float]]:
        """Single changes of a mix that save work, those that save most first: group, pick and what it saves."""
        found = [
            (index, pick, row[mix.picks[index]].work - option.work)
            for index, row in enumerate(self.costs.options[mix.family])
            for pick, option in row.items()
            if option.work < row[mix.picks[index]].work
        ]
        return sorted(found, key=lambda change: -change[2])
