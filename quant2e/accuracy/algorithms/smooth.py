"""SmoothQuant: outliers of activations move into weights, whose channels can bear them.

    s_j = max|x_j|^α / max|w_j|^(1-α)        x_j / s_j by the op that makes it,  w_j · s_j in the ops that read it

G. Xiao, J. Lin, M. Seznec, H. Wu, J. Demouth, S. Han: SmoothQuant, ICML 2023, equation 4. ``α`` is chosen for each
group of layers that read one tensor: the one under which these layers, rounded as the quantizer will round them, lose
least on batches that were not calibrated on. There ``max|w_j|`` is taken of rows over their largest value each, since
weights mostly have a scale for each row: one row of large weights says little about what the others bear. Factors go
into what makes the tensor, a norm, the projection in front of an attention, a gate (`channel_scaling`); where nothing
can take them a division can, if that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.channels.inserted import drop_unused, insert_factors
from quant2e.accuracy.algorithms.channels.moves import move
from quant2e.accuracy.algorithms.channels.ranges import activation_ranges, largest
from quant2e.accuracy.algorithms.channels.scaling import ChannelScaling, channel_scaling
from quant2e.accuracy.algorithms.channels.search import Split, balanced, choose_scales, chosen_factors, logs_of
from quant2e.accuracy.algorithms.channels.walk import Strength
from quant2e.annotation.quantizer import Quantizer
from quant2e.calibration.batches import check_batch, check_iterable
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import as_graph_module

ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Smooth(Algorithm):
    """SmoothQuant. ``alpha``: the exponent of all groups; None: each group's is chosen on data.

    ``insert``: put a division in float where no op in front can take the factors and the error falls by 1.5 dB;
    only where exponents are chosen. Raises `Quant2eError` for an alpha outside of 0 to 1, and for both settings.
    """

    name: ClassVar[str] = "smooth"
    stage: ClassVar[Stage] = Stage.CAPTURED
    exact: ClassVar[bool] = True

    alpha: float | None = None
    insert: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None and (isinstance(self.alpha, bool) or not 0.0 <= self.alpha <= 1.0):
            raise Quant2eError(f"smooth: alpha={self.alpha!r}: a number from 0 to 1, or None to choose it on data")
        if self.insert and self.alpha is not None:
            raise Quant2eError("smooth: insert=True needs alpha=None: whether a division pays is measured")

    def apply(self, model: GraphModule, context: Context) -> list[str]:
        """Smooth ``model`` by what its activations are on ``context.calls``."""
        return _smooth(model, context.quantizer, context.calls, self)


def smooth(
    captured: GraphModule,
    quantizer: Quantizer,
    data: Iterable[Any],
    *,
    alpha: float | None = None,
    insert: bool = False,
) -> GraphModule:
    """A captured graph with smoothed activations, which computes the same to rounding; ``captured`` stays as it is.

    ``quantizer``: that the graph will be prepared with. ``data``: batches of what the model takes; a few will do.
    ``alpha``, ``insert``: as for `Smooth`. Raises `CaptureError` for what is no captured graph, and `CalibrationError`
    for data that the model does not take.
    """
    model, settings = as_graph_module(captured), Smooth(alpha=alpha, insert=insert)
    _smooth(model, quantizer, calls_of(data, "smooth", model), settings)
    return model


def calls_of(data: Iterable[Any], name: str, graph: GraphModule) -> list[Call]:
    """Batches as calls of ``graph``. Raises `CalibrationError` for none, and for what is no data."""
    check_iterable(data, "data")
    calls = [check_batch(batch, f"batch {index}", graph) for index, batch in enumerate(data)]
    if not calls:
        raise CalibrationError(f"{name} needs a batch of data to see the channels of activations")
    return calls


def _smooth(model: GraphModule, quantizer: Quantizer, calls: Sequence[Call], settings: Smooth) -> list[str]:
    if not calls:
        return []
    inserted = insert_factors(model) if settings.insert else ()
    scaling, data = channel_scaling(model), Split.of(calls)
    made = _Factors(model, scaling, data.fit, by_row=settings.alpha is None)
    lines: list[str] = []
    if not scaling.groups:
        factors = torch.ones(scaling.count)
    elif settings.alpha is not None:
        factors = made(float(settings.alpha))
        for group in scaling.groups:
            if scaling.clamped(group):  # bounds for each channel are ops of their own, and nothing says that they pay
                factors[group.channels] = 1.0
            else:
                lines.append(f"{group}: {group.channels.numel()} channels, exponent {settings.alpha:g}")
    else:
        choices = choose_scales(model, quantizer, data, ALPHAS, made)
        factors, lines = chosen_factors(scaling, choices, made), [str(choice) for choice in choices]
    move(model, scaling, factors)
    drop_unused(model, inserted)
    return lines


class _Factors:
    """The factors of SmoothQuant for an exponent. ``by_row``: rows of weights count over their largest value."""

    def __init__(self, model: GraphModule, scaling: ChannelScaling, calls: Sequence[Call], *, by_row: bool) -> None:
        self._scaling = scaling
        self._activations = logs_of(activation_ranges(model, scaling, calls), scaling)
        weights = {
            each.node.name: largest(_over_rows(each) if by_row else each.size, each.reads, scaling.count)
            for each in scaling.strengths
            if each.is_matrix and each.reads is not None
        }
        self._weights = logs_of(weights, scaling)

    def __call__(self, alpha: float) -> Tensor:
        return balanced((1.0 - alpha) * self._weights - alpha * self._activations, self._scaling)


def _over_rows(matrix: Strength) -> Tensor:
    """The values of a weight matrix over the largest of their row: along the axes along which it reads channels."""
    axes = [axis for axis, count in enumerate(matrix.makes.shape) if count == 1]
    if not axes or not matrix.size.numel():
        return matrix.size
    most = matrix.size.amax(axes, keepdim=True)
    return matrix.size / torch.where(most > 0, most, 1.0)
