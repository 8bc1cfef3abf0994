"""Re-estimation of batch-norm statistics: a norm behind a quantized op normalises what that op really gives.

    norm(ŷ) = g (ŷ - E[ŷ]) / √(Var[ŷ] + ε) + h        ŷ: with rounded weights, on rounded inputs

Rounding moves the mean and the variance of what a norm reads; statistics of the float model are wrong for it by then
(Sun et al., "Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks", NeurIPS 2019, which
re-tunes them before inference; Nagel et al., "Overcoming Oscillations in Quantization-Aware Training",
arXiv:2203.11086, section 4.4).

In a calibrated graph norms are folded, which does not take them away: what they did to the result of their op, a mean
and a deviation for each channel, is restored by the folded weight and bias,

    y = r (ŷ - E[ŷ]) + E[y]        r = √Var[y] / √Var[ŷ]        w ← r w, b ← r (b - E[ŷ]) + E[y]

with ``y`` the float result on the same data, layer by layer in the order of the graph, each behind those that are right
already. The scales of the weight take the factor, so its integers stay as they are, whichever algorithm chose them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.layers.biased_layers import BiasedLayer, bias_of, biased_layers, shift_bias
from quant2e.accuracy.algorithms.layers.samples import (
    along_axis,
    channel_moments,
    first_samples,
    note_step,
    read_samples,
)
from quant2e.accuracy.algorithms.layers.scaled_weights import scale_weight, takes_factors
from quant2e.accuracy.algorithms.layers.trained_norms import reestimate_trained_norms
from quant2e.accuracy.lock_step import BatchRun, in_lock_step
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import copy_graph
from quant2e.passes.fold_batch_norm import NORMALIZED
from quant2e.passes.train_batch_norm import FUSED


@dataclass(frozen=True, slots=True)
class ReestimateBatchNorm(Algorithm):
    """``samples``: so many are measured on, in whole batches, whose tensors are held in float and quantized."""

    name: ClassVar[str] = "reestimate_batch_norm"
    stage: ClassVar[Stage] = Stage.CALIBRATED
    exact: ClassVar[bool] = False
    samples: int = 128

    def __post_init__(self) -> None:
        if type(self.samples) is not int or self.samples < 1:
            raise Quant2eError(f"reestimate_batch_norm: samples={self.samples!r} is no whole number above 0")

    def apply(self, model: GraphModule, context: Context) -> list[str]:
        """Edit the weights and biases of ``model`` that norms were folded into; a line for each."""
        return _reestimated(model, first_samples(context.calls, self.samples))


def reestimate_batch_norm(prepared: GraphModule, data: Iterable[Any], *, samples: int = 128) -> GraphModule:
    """A copy of ``prepared`` whose batch norms have the statistics of what the quantized ops before them give.

    ``prepared``: a calibrated graph of `quant2e.prepare_pt2e`, whose norms are folded, or one that was trained, of
    `quant2e.prepare_qat_pt2e`; it is left as it is. In the first, each op that a norm was folded into gets back the
    mean and the deviation that its output has in float, through its bias and the scales of its weight (the mean alone,
    where the weight has one scale for all channels). In the second the norms get new running statistics. ``data``: what
    the model takes, as for `quant2e.calibrate`, of which ``samples`` are read.

    `quant2e.report_of` has a line for each norm. Raises `Quant2eError` for a graph that is no prepared one, and
    `CalibrationError` for one that is not calibrated, or data without a batch.
    """
    algorithm = ReestimateBatchNorm(samples)
    trained = FUSED in prepared.meta
    gm = copy.deepcopy(prepared) if trained else copy_graph(prepared)
    calls = read_samples(data, samples, algorithm.name, gm)
    if trained:
        changes = reestimate_trained_norms(gm, calls)
    else:
        changes = _reestimated(gm, calls)
        gm.recompile()
    note_step(gm, algorithm.name, changes)
    return gm


def _reestimated(gm: GraphModule, calls: Sequence[Call]) -> list[str]:
    """Restore mean and deviation behind each op of ``gm`` that a norm was folded into, in place."""
    simulated = SimulatedGraph(gm)
    layers = [layer for layer in biased_layers(gm) if NORMALIZED in layer.op.meta and not layer.reason]
    scalable = frozenset(layer.op.name for layer in layers if takes_factors(gm, layer))
    lines = []
    for layer, (factors, shift) in zip(layers, _measured(simulated, layers, scalable, calls), strict=True):
        if not bool(torch.isfinite(shift).all()) or not bool((shift != 0).any() or (factors != 1).any()):
            continue
        bias = bias_of(gm, layer)
        if layer.op.name in scalable:
            scale_weight(gm, layer, factors)
        shift_bias(gm, layer, shift + (factors - 1.0) * bias)
        low, high = float(factors.min()), float(factors.max())
        only = "" if layer.op.name in scalable else "; its weight has one scale, so deviations stay"
        lines.append(f"{layer.place}: deviations times {low:.3f} to {high:.3f}{only}")
    return lines


def _measured(
    simulated: SimulatedGraph, layers: Sequence[BiasedLayer], scalable: frozenset[str], calls: Sequence[Call]
) -> list[tuple[Tensor, Tensor]]:
    """Factors and shifts that restore each layer's output, behind the layers that are restored already."""
    nodes = {node.name: node for node in simulated.graph.graph.nodes}
    found: list[tuple[Tensor, Tensor]] = []

    def visit_of(layer: BiasedLayer) -> Any:
        node = nodes[layer.adds.name]

        def visit(rounded: Sequence[BatchRun], exact: Sequence[BatchRun]) -> None:
            mean, deviation = channel_moments([run.env[node] for run in exact], layer.axis)
            now, spread = channel_moments([run.env[node] for run in rounded], layer.axis)
            factors = torch.where((spread > 0) & (deviation > 0), deviation / spread, 1.0)
            factors = factors if layer.op.name in scalable else torch.ones_like(factors)
            shift = mean - factors * now
            found.append((factors, shift))
            if bool(torch.isfinite(shift).all()):
                for run in rounded:
                    value = run.env[node]
                    scaled = value * along_axis(factors, value, layer.axis)
                    run.env[node] = scaled + along_axis(shift, value, layer.axis)

        return visit

    visits = {nodes[layer.adds.name].next: visit_of(layer) for layer in layers}
    in_lock_step(simulated, calls, visits, also_float=True)
    return found
