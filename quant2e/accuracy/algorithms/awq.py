"""AWQ: weights that large activations meet are rounded more finely, by a factor that the activations give back.

    s_j = mean|x_j|^β        w_j · s_j in the ops that read x,  x_j / s_j by the op that makes it

J. Lin, J. Tang, H. Tang, S. Yang, W.-M. Chen, W.-C. Wang, G. Xiao, X. Dang, C. Gan, S. Han: AWQ: Activation-aware
Weight Quantization for LLM Compression and Acceleration, MLSys 2024, section 3.2. For weight-only quantization, in
groups above all. ``β`` is chosen for each group of layers that read one tensor: the one under which these layers, with
weights rounded as the quantizer rounds them, lose least on batches that gave no means. Its clipping of weights is a
matter of their ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.channels.moves import move
from quant2e.accuracy.algorithms.channels.ranges import activation_means
from quant2e.accuracy.algorithms.channels.scaling import channel_scaling
from quant2e.accuracy.algorithms.channels.search import Split, balanced, choose_scales, chosen_factors, logs_of
from quant2e.accuracy.algorithms.smooth import calls_of
from quant2e.annotation.quantizer import Quantizer
from quant2e.errors import Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import as_graph_module


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq(Algorithm):
    """Activation-aware weight scaling; ``steps``: how many exponents from 1 / steps to 1 are tried.

    Each costs a preparation and a run. Raises `Quant2eError` for less than one.
    """

    name: ClassVar[str] = "awq"
    stage: ClassVar[Stage] = Stage.CAPTURED
    exact: ClassVar[bool] = True

    steps: int = 8

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise Quant2eError(f"awq: steps={self.steps!r}: a whole number, at least 1")

    def apply(self, model: GraphModule, context: Context) -> list[str]:
        """Scale ``model`` by what its activations are on ``context.calls``."""
        return _awq(model, context.quantizer, context.calls, self)


def awq(captured: GraphModule, quantizer: Quantizer, data: Iterable[Any], *, steps: int = 8) -> GraphModule:
    """A captured graph whose weights round better, which computes the same to rounding; ``captured`` stays as it is.

    ``quantizer``: that the graph will be prepared with. ``data``: batches of what the model takes; a few will do.
    ``steps``: as for `Awq`. Raises `CaptureError` for what is no captured graph, and `CalibrationError` for data that
    the model does not take.
    """
    model, settings = as_graph_module(captured), Awq(steps=steps)
    _awq(model, quantizer, calls_of(data, "awq", model), settings)
    return model


def _awq(model: GraphModule, quantizer: Quantizer, calls: Sequence[Call], settings: Awq) -> list[str]:
    scaling = channel_scaling(model)
    if not calls or not scaling.groups:
        return []
    data = Split.of(calls)
    means = logs_of(activation_means(model, scaling, data.fit), scaling)

    def factors(exponent: float) -> Tensor:
        return balanced(-exponent * means, scaling)

    exponents = [(step + 1) / settings.steps for step in range(settings.steps)]
    choices = choose_scales(model, quantizer, data, exponents, factors)
    move(model, scaling, chosen_factors(scaling, choices, factors))
    return [str(choice) for choice in choices]
