"""Task: a trained model with the data to calibrate it, to choose on and to evaluate on, which share nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Call = Callable[..., Tensor]
"""A model, or what was made from it: positional inputs to its only output."""

Batch = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model in eval mode and what it is measured by.

    ``calibration``: batches of inputs. ``measure``: runs any callable with the model's signature on the evaluation
    data; the first of its numbers is ``metric``, and all are larger where the model is better. ``score``: the metric on
    data that is neither calibrated nor evaluated on, for choices. ``share``: the metric is a share, printed in points.
    ``samples``: how many the metric is a share of; 0: it is no share. ``note``: where weights and data are from.
    """

    name: str
    model: nn.Module
    example_inputs: Batch
    dynamic_shapes: Any
    calibration: Sequence[Batch]
    measure: Callable[[Call], Mapping[str, float]]
    score: Callable[[Call], float]
    metric: str
    samples: int = 0
    note: str = ""


class MissingModelError(Exception):
    """A model cannot be made here; the message says why and what to install."""
