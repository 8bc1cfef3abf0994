"""Algorithm: one step that mends accuracy, on a captured graph or on a calibrated one, under any quantizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from torch.fx import GraphModule

from quant2e.annotation.quantizer import Quantizer
from quant2e.graph.captured.calls import Call


class Stage(Enum):
    """Where in the pipeline an algorithm works."""

    CAPTURED = "captured"
    """On the float graph, before a quantizer annotates it."""
    CALIBRATED = "calibrated"
    """On the prepared graph, whose observers have seen the data."""


@dataclass(frozen=True, slots=True)
class Context:
    """What an algorithm may ask for besides the graph.

    ``quantizer``: annotates the graph later, or has; ``calls``: batches that may be looked at, which are not those that
    measure the result; ``prepare``: a captured graph, prepared by the quantizer and calibrated on those.
    """

    quantizer: Quantizer
    calls: Sequence[Call]
    prepare: Callable[[GraphModule], GraphModule]


class Algorithm(ABC):
    """A step that mends; its settings are the fields of a frozen dataclass, checked when it is made.

    ``name``: what recipes and ``quantize(algorithms=[...])`` call it. ``exact``: the float result is kept to rounding.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    exact: ClassVar[bool]

    @abstractmethod
    def apply(self, model: GraphModule, context: Context) -> list[str]:
        """Edit ``model``, a copy that is the caller's own; tensors it shares with others are replaced, not written.

        Returns a line for each place that was changed, with its numbers; none: there was nothing to mend, and ``model``
        is as it was.
        """
