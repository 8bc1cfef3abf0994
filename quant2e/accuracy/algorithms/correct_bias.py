"""Bias correction: rounding shifts the mean of a layer's output, and its bias takes the shift out again.

    b ← b + E[y] - E[ŷ]        y: in float, ŷ: quantized; one number for each output channel

By measurement (Finkelstein, Almog and Grobman, "Fighting Quantization Bias With Bias", arXiv:1906.03193; Nagel, van
Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv:1906.04721, appendix D): layer by layer in the order of the graph, each behind the layers that are corrected
already, so that it also takes out what it inherits of theirs.

Analytic (Nagel et al., section 4.2): the shift that the rounding of the weight alone causes follows from the mean of
the layer's input,

    E[ŷ] - E[y] = (ŵ - w) E[x]

summed over the kernel of a convolution, as if its padding were not there. E[x] is the mean of each input channel over
the data, or, without data, that of a normal distribution whose mean and deviation are those of the batch norm before
the layer, cut by the relu or clamp between them (their appendix C).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.layers.biased_layers import (
    CONVOLUTIONS,
    BiasedLayer,
    biased_layers,
    input_operand,
    shift_bias,
    weight_operand,
)
from quant2e.accuracy.algorithms.layers.expected_shift import expected_shift, mean_behind_norm
from quant2e.accuracy.algorithms.layers.samples import (
    along_axis,
    channel_moments,
    first_samples,
    note_step,
    read_samples,
)
from quant2e.accuracy.lock_step import BatchRun, in_lock_step
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.constants import Constants, evaluate
from quant2e.observers.base import observed


@dataclass(frozen=True, slots=True)
class CorrectBias(Algorithm):
    """``method``: "sequential" measures, "analytic" computes. ``samples``: so many are measured on, in whole batches.

    Of every sample, the tensors that are still to be read are held, in float and quantized.
    """

    name: ClassVar[str] = "correct_bias"
    stage: ClassVar[Stage] = Stage.CALIBRATED
    exact: ClassVar[bool] = False
    method: Literal["sequential", "analytic"] = "sequential"
    samples: int = 128

    def __post_init__(self) -> None:
        if self.method not in ("sequential", "analytic"):
            raise Quant2eError(f"correct_bias: method={self.method!r} is neither 'sequential' nor 'analytic'")
        if type(self.samples) is not int or self.samples < 1:
            raise Quant2eError(f"correct_bias: samples={self.samples!r} is no whole number above 0")

    def apply(self, model: GraphModule, context: Context) -> list[str]:
        """Edit the biases of ``model``; a line for each layer whose bias moved, and one for those that have none."""
        return _corrected(model, first_samples(context.calls, self.samples), self.method)


def correct_bias(
    prepared: GraphModule,
    data: Iterable[Any] | None = None,
    *,
    method: Literal["sequential", "analytic"] = "sequential",
    samples: int = 128,
) -> GraphModule:
    """A copy of ``prepared`` in which biases take out what quantization shifts the outputs of layers by, on average.

    ``prepared``: a calibrated graph of `quant2e.prepare_pt2e`, left as it is; its convolutions, also transposed, its
    linears and products with a constant are corrected where an operand of theirs is quantized. One without a bias is
    given one, unless the quantizer stores biases as integers. ``data``: what the model takes, as for
    `quant2e.calibrate`, of which ``samples`` are read; other data than measures the result. ``method``: "sequential"
    measures each layer behind those before it, quantized and corrected; "analytic" takes out what the rounding of
    weights causes, and needs no data behind batch norms: `correct_bias(prepared, method="analytic")`.

    The result converts, saves and lowers as ever; `quant2e.report_of` has a line for each layer. Raises `Quant2eError`
    for a graph that is no prepared one or is being trained, and `CalibrationError` for one that is not calibrated, or
    data without a batch.
    """
    algorithm = CorrectBias(method, samples)
    if data is None and method == "sequential":
        raise Quant2eError('correct_bias measures on data: give some, or method="analytic", which can do without')
    gm = copy_graph(prepared)
    calls = [] if data is None else read_samples(data, samples, algorithm.name, gm)
    changes = tuple(_corrected(gm, calls, method))
    gm.recompile()
    note_step(gm, algorithm.name, changes)
    return gm


def _corrected(gm: GraphModule, calls: Sequence[Call], method: str) -> list[str]:
    """Correct ``gm`` in place. Without ``calls``, by what is known of batch norms."""
    simulated = SimulatedGraph(gm)
    found = biased_layers(gm)
    layers = [layer for layer in found if not layer.reason]
    sequential = method == "sequential"
    shifts = _measured(simulated, layers, calls) if sequential else _computed(simulated, gm, layers, calls)
    lines = [_line(gm, layer, *shifts[layer.op.name]) for layer in layers if _moves(shifts.get(layer.op.name))]
    left = [f"{layer.place}: {layer.reason}" for layer in found if layer.reason]
    unknown = [layer.place for layer in layers if layer.op.name not in shifts]
    if unknown:
        left.append(f"{', '.join(unknown)}: nothing is known of the mean of the input")
    return [*lines, *(f"left as it is: {line}" for line in left)] if lines else []


def _moves(found: tuple[Tensor, Tensor] | None) -> bool:
    return found is not None and bool(torch.isfinite(found[0]).all()) and bool((found[0] != 0).any())


def _line(gm: GraphModule, layer: BiasedLayer, shift: Tensor, deviation: Tensor) -> str:
    had = shift_bias(gm, layer, shift)
    relative = shift.abs() / deviation.clamp_min(torch.finfo(torch.float64).tiny)
    share = f", {float(relative.max()):.1%} of the deviation of its channel" if bool((deviation > 0).all()) else ""
    added = "" if had else "; a bias is added"
    return f"{layer.place}: the mean was off by up to {float(shift.abs().max()):.2g}{share}{added}"


def _measured(
    simulated: SimulatedGraph, layers: Sequence[BiasedLayer], calls: Sequence[Call]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The shift that makes up for the error of each layer's mean, and the deviation of its output, by name."""
    nodes = {node.name: node for node in simulated.graph.graph.nodes}
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def visit_of(layer: BiasedLayer) -> Any:
        node = nodes[layer.adds.name]

        def visit(rounded: Sequence[BatchRun], exact: Sequence[BatchRun]) -> None:
            mean, deviation = channel_moments([run.env[node] for run in exact], layer.axis)
            shift = mean - channel_moments([run.env[node] for run in rounded], layer.axis)[0]
            found[layer.op.name] = shift, deviation
            if bool(torch.isfinite(shift).all()):
                for run in rounded:
                    value = run.env[node]
                    run.env[node] = value + along_axis(shift, value, layer.axis)

        return visit

    visits = {nodes[layer.adds.name].next: visit_of(layer) for layer in layers}
    in_lock_step(simulated, calls, visits, also_float=True)
    return found


def _computed(
    simulated: SimulatedGraph, gm: GraphModule, layers: Sequence[BiasedLayer], calls: Sequence[Call]
) -> dict[str, tuple[Tensor, Tensor]]:
    """As `_measured`, of the rounding of weights alone, from the means of inputs; those of norms without ``calls``."""
    nodes = {node.name: node for node in simulated.graph.graph.nodes}
    behind = {layer.op.name: mean_behind_norm(input_operand(layer.op)) for layer in layers}
    means = _input_means(simulated, layers, calls) if calls else {k: v for k, v in behind.items() if v is not None}
    constants, found = Constants(gm.graph), {}
    for layer in layers:
        point, source = weight_operand(nodes[layer.op.name]), observed(weight_operand(layer.op))
        if layer.op.name not in means or source not in constants or point not in simulated.points:
            continue
        exact = evaluate(gm, source).detach()
        error = simulated.points[point].rounded(exact).detach().double() - exact.double()
        found[layer.op.name] = -expected_shift(layer.op, error, means[layer.op.name]), torch.zeros(1)
    return found


def _input_means(simulated: SimulatedGraph, layers: Sequence[BiasedLayer], calls: Sequence[Call]) -> dict[str, Tensor]:
    """The mean of each channel of each layer's input in float, over the data."""
    nodes = {node.name: node for node in simulated.graph.graph.nodes}
    found: dict[str, Tensor] = {}

    def visit_of(layer: BiasedLayer) -> Any:
        source = input_operand(nodes[layer.op.name])
        axis = layer.axis if layer.op.target in CONVOLUTIONS else source.meta["val"].dim() - 1

        def visit(_: Sequence[BatchRun], exact: Sequence[BatchRun]) -> None:
            found[layer.op.name] = channel_moments([run.env[source] for run in exact], axis)[0]

        return visit

    in_lock_step(simulated, calls, {nodes[layer.op.name]: visit_of(layer) for layer in layers}, also_float=True)
    return found
