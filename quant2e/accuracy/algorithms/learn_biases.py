"""Learned biases: shifts of the results of layers with which the quantized model errs least at its output.

    min over b    Σ ‖f̂(x; b) - f(x)‖² / ‖f(x)‖²        f: in float, f̂: quantized, b: added to the results of layers

What matters at the output may be a small part of what a layer makes, and the mean of an error over all of it, which
`correct_bias` takes out, another one. Here gradients of the output say which way a bias should go; they pass straight
through rounding (Y. Bengio, N. Leonard, A. Courville, arXiv:1308.3432). The float model is the teacher, so no labels
are needed: the idea of A. Finkelstein et al., "QFT: Post-training quantization via fast joint finetuning of all degrees
of freedom", arXiv:2212.02634, and, for norms, of L. Li et al., "Norm Tweaking", arXiv:2309.02784, with all integers of
weights and all scales left as they are. A bias costs nothing where the layer runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.layers.biased_layers import BiasedLayer, biased_layers, shift_bias
from quant2e.accuracy.algorithms.layers.samples import along_axis
from quant2e.accuracy.algorithms.rounding.on_copy import on_copy
from quant2e.accuracy.algorithms.rounding.weight_layers import check_calibrated, simulated_weights
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.inputs import flat_inputs
from quant2e.isolation import IsolatedRandomness


@dataclass(frozen=True)
class LearnedBiases(Algorithm):
    """Shift the biases of quantized layers by what gradients of the output's error ask for.

    ``iterations``: steps of Adam (Kingma and Ba, arXiv:1412.6980), each on one batch, all of which take turns.
    ``rate``: of the first step, in deviations of a layer's result; it falls to 0 along a cosine. ``seed``: of the order
    of batches. Raises `Quant2eError` for settings that cannot be.
    """

    name: ClassVar[str] = "learn_biases"
    stage: ClassVar[Stage] = Stage.CALIBRATED
    exact: ClassVar[bool] = False

    iterations: int = 48
    rate: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.iterations) is not int or self.iterations < 1:
            raise Quant2eError(f"learn_biases: iterations={self.iterations!r} is no whole number above 0")
        if not 0 < self.rate < 1:
            raise Quant2eError(f"learn_biases: rate={self.rate!r}: a part of a deviation, above 0, below 1")

    def apply(self, model: GraphModule, context: Context) -> list[str]:
        """Edit the biases of ``model``; a line for each layer."""
        return self.learn(model, context.calls)

    def learn(self, model: GraphModule, calls: Sequence[Call]) -> list[str]:
        """As `apply`, on ``calls``."""
        check_calibrated(model, self.name)
        if not calls:
            raise CalibrationError(f"{self.name} needs at least one batch of data")
        simulated, layers = simulated_weights(model), [each for each in biased_layers(model) if not each.reason]
        if simulated is None or not layers:
            return []
        found = _Learning(simulated, layers, self).learned(calls)
        lines = []
        for layer, (shift, deviation) in zip(layers, found, strict=True):
            if bool((shift != 0).any()):
                added = "" if shift_bias(model, layer, shift.double()) else "; a bias is added"
                most = float(shift.abs().max())
                lines.append(f"{layer.place}: {most:.2g} at most, {most / deviation:.1%} of its deviation{added}")
        model.recompile()
        return lines


class _Learning:
    """The shifts of ``layers``, in parts of the deviation of what each makes."""

    def __init__(self, simulated: SimulatedGraph, layers: Sequence[BiasedLayer], settings: LearnedBiases) -> None:
        nodes = {node.name: node for node in simulated.graph.graph.nodes}
        self._simulated, self._settings = simulated, settings
        self._layers = [(nodes[layer.adds.name], layer) for layer in layers]
        self._units = [torch.zeros(layer.channels, requires_grad=True) for layer in layers]
        self._deviations = [1.0] * len(layers)

    def learned(self, calls: Sequence[Call]) -> list[tuple[Tensor, float]]:
        """The shift of each layer and the deviation of its result; zeros where the error is not finite."""
        with IsolatedRandomness(), torch.no_grad():
            self._measure(calls[0])
        optimizer = torch.optim.Adam(self._units, lr=self._settings.rate, betas=(0.9, 0.99))
        for step, index in zip(range(self._settings.iterations), self._order(len(calls)), strict=False):
            falling = 0.5 * (1 + math.cos(math.pi * step / self._settings.iterations))
            optimizer.param_groups[0]["lr"] = self._settings.rate * falling
            with torch.enable_grad():
                error = self._error(calls[index])
                optimizer.zero_grad()
                error.backward()
            if not all(bool(torch.isfinite(unit.grad).all()) for unit in self._units if unit.grad is not None):
                return [(torch.zeros_like(unit), 1.0) for unit in self._units]
            optimizer.step()
        return [(unit.detach() * size, size) for unit, size in zip(self._units, self._deviations, strict=True)]

    def _order(self, count: int) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._settings.seed)
        while True:
            yield from torch.randperm(count, generator=generator).tolist()

    def _measure(self, call: Call) -> None:
        """The deviations of the results of layers, in float."""
        run = _Shifted(self._simulated, {}, rounded=False, measured={node for node, _ in self._layers})
        run.outputs(call)
        for place, (node, _) in enumerate(self._layers):
            size = run.deviations.get(node, 0.0)
            self._deviations[place] = size if math.isfinite(size) and size > 0 else 1.0

    def _error(self, call: Call) -> Tensor:
        """The power of the output's error over the output's, of what is finite in float."""
        shifts = {
            node: (unit * size, layer.axis)
            for (node, layer), unit, size in zip(self._layers, self._units, self._deviations, strict=True)
        }
        with torch.no_grad(), IsolatedRandomness():
            exact = _Shifted(self._simulated, {}, rounded=False).outputs(call)
        with IsolatedRandomness():  # a model that draws numbers draws the same in both
            found = _Shifted(self._simulated, shifts, rounded=True).outputs(call)
        noises, signal = [], 0.0
        for a, b in zip(exact, found, strict=True):
            finite = torch.isfinite(a)
            noises.append(torch.where(finite, b - a, 0.0).float().square().sum())
            signal += float(torch.where(finite, a, 0.0).float().square().sum())
        if not any(noise.requires_grad for noise in noises):
            raise Quant2eError(f"{LearnedBiases.name}: no float output of this model rests on a bias")
        return torch.stack(noises).sum() / (signal if signal > 0 else 1.0)


class _Shifted(Interpreter):
    """Runs a simulated graph with shifts behind some ops, rounded so that gradients pass, or in float."""

    def __init__(
        self,
        simulated: SimulatedGraph,
        shifts: Mapping[Node, tuple[Tensor, int]],
        *,
        rounded: bool,
        measured: Iterable[Node] = (),
    ) -> None:
        super().__init__(simulated.graph)
        self._simulated, self._shifts, self._rounded = simulated, shifts, rounded
        self._measured = frozenset(measured)
        self.deviations: dict[Node, float] = {}

    def outputs(self, call: Call) -> list[Tensor]:
        """The float outputs of one call."""
        self._simulated.start_again()
        made = self.run(*flat_inputs(self._simulated.graph, call.copied()), enable_io_processing=False)
        return [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of the model, which gradients do not reach."""
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, n: Node) -> Any:
        """The value of ``n``, shifted."""
        if n in self._simulated.points:
            return self._at_point(n)
        value = super().run_node(n)
        if n in self._measured:
            self.deviations[n] = float(value.float().std(correction=0))
        if n not in self._shifts:
            return value
        shift, axis = self._shifts[n]
        return value + along_axis(shift.to(value.device), value, axis)

    def _at_point(self, point: Node) -> Tensor:
        x: Tensor = self.env[point.all_input_nodes[0]]
        if not self._rounded:
            return x
        constant = self._simulated.constant(point)
        if constant is not None:
            return constant
        with torch.no_grad():
            step: Tensor = self._simulated.points[point].rounded(x) - x
        return x + step


def learn_biases(
    prepared: GraphModule, data: Iterable[Any], *, iterations: int = 48, rate: float = 5e-4, seed: int = 0
) -> GraphModule:
    """A copy of a calibrated graph with the biases of least output error; for the settings see `LearnedBiases`.

    ``data``: batches of what the model takes, other ones than measure the result. ``prepared`` stays as it is; what the
    copy computes in float moves by what its biases make up for. Notes of its report say how far each moved. Raises
    `Quant2eError` for a graph that is not calibrated or whose float output rests on no bias, and `CalibrationError`
    without data.
    """
    algorithm = LearnedBiases(iterations, rate, seed)
    return on_copy(algorithm.name, algorithm.learn, prepared, data)
