"""Ranges for paired 16-bit sums, chosen per layer: u8 × s8 products stay exact on CPUs that add two of them.

With activations in 0..top and the two largest weights of a channel (and the two smallest) summing to p, no 16-bit lane
overflows while ``top · p <= 32767``: the bound of `quant2e.cpu`.

That product is a budget of two sides. Fewer activation integers make coarser activations, a smaller p means larger
weight scales. Which side gives, and how far, is decided after calibration, for all layers that read one tensor
together: where the noise that both add to the layers' outputs is least.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.annotation.pattern import short_name
from quant2e.annotation.specs import EdgeOrNode
from quant2e.cpu import LANE, extreme_weights, pair_sums, pairs_fit
from quant2e.graph.dataflow import operand
from quant2e.observers.measuring import HistogramObserver, PerChannelMinMaxObserver, PlaceholderObserver
from quant2e.observers.uniform import ObserverOptions
from quant2e.ranges.qparams import NumberFormat, quantize_per_channel
from quant2e.ranges.quantization_error import expected, filling
from quant2e.ranges.search import mse

TOPS = tuple(range(127, 256, 16))
"""Candidates for the largest activation integer: 7 bits, 8 bits, and between."""

_CLEARLY = 0.98
"""All 8 bits of the activations are given up only for less than this part of the noise: clamping costs time."""

_UNMEASURED = 12.0**2 / 12 / 255**2
"""Noise of 8-bit activations over their mean square where nobody measured it, as in dynamic quantization: a range of
twelve standard deviations."""


class PairedWeightObserver(PerChannelMinMaxObserver):
    """Also keeps, per channel, the two largest and the two smallest weights and the sum of squares.

    Alone it gives what a `PerChannelMinMaxObserver` gives. `link` makes its scales leave room for activations.
    """

    extremes: Tensor
    """``[channels, 4]``: the two largest weights, at least 0, and the two smallest, at most 0."""
    energy: Tensor
    """``[channels]``: the sum of squares."""

    def __init__(self, **options: Unpack[ObserverOptions]) -> None:
        super().__init__(**options)
        self.agreement: Agreement | None = None
        self.layers: tuple[str, ...] = ()
        self.depth = 0
        self.register_buffer("extremes", torch.zeros(0, 4))
        self.register_buffer("energy", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.frozen and self.agreement is not None:
            self._measure(x.detach())
        return super().forward(x)

    def _measure(self, x: Tensor) -> None:
        rows = x.movedim(self.ch_axis, 0).flatten(1).float()
        self.depth = rows.shape[1]
        self.extremes = extreme_weights(rows)
        self.energy = rows.square().sum(1)

    def scales(self, top: int) -> Tensor:
        """Scales ``[channels]`` with which no two products with activations in 0..top leave a lane."""
        own, _ = self.grid.qparams(*self.range())
        limit, pairs = LANE.max // top, pair_sums(self.extremes).abs().amax(1)
        found = torch.maximum(own, pairs / (limit - 1))  # each of two roundings adds at most a half
        for finer in (*(pairs / (limit - spare) for spare in (0.75, 0.5, 0.25, 0.0)), own):
            tried = torch.maximum(own, finer)
            found = torch.where(pairs_fit(self._integers(tried), top), tried, found)
        return found

    def _integers(self, scales: Tensor) -> Tensor:
        """`extremes` as the weights are stored with these scales."""
        g = self.grid
        zeros = torch.zeros_like(scales)
        integers: Tensor = quantize_per_channel(self.extremes, scales, zeros, 0, g.quant_min, g.quant_max, torch.int32)
        return integers

    def noise(self, scales: Tensor) -> float:
        """Mean square of the rounding errors over that of the weights. A channel that rounds to zero loses itself."""
        errors = torch.minimum(scales.square() * (self.depth / 12), self.energy)
        return float(errors.double().sum() / self.energy.double().sum().clamp(min=torch.finfo(torch.float32).tiny))

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Float32 scales and zero points of 0, ``[channels]``."""
        if self.agreement is None:
            return super().calculate_qparams()
        scales = self.scales(self.agreement.top())
        return scales, torch.zeros_like(scales, dtype=torch.int64)

    def integer_limits(self, nearest: Tensor) -> tuple[Tensor, Tensor] | None:
        """As `quant2e.observers.base.LimitedIntegers` says; None where no activations were agreed with.

        Of a row that may sum to p in pairs, and whose largest is a: that one to p - u, all others to u = min(p - a,
        p / 2); and the same for the smallest.
        """
        if self.agreement is None or not self.observed:
            return None
        top, rows = self.agreement.top(), nearest.movedim(self.ch_axis, 0)
        flat = rows.reshape(rows.shape[0], -1)
        low, high = -_limits(-flat, -LANE.min // top), _limits(flat, LANE.max // top)
        low, high = (end.reshape(rows.shape).movedim(0, self.ch_axis) for end in (low, high))
        return low, high

    def remark(self) -> str:
        """What was chosen for the layers that use these weights, for the report; empty when nothing was."""
        if self.agreement is None or not self.observed:
            return ""
        top = self.agreement.top()
        growth = float((self.scales(top) / self.grid.qparams(*self.range())[0]).log().mean().exp())
        weights = "weights all 8 bits" if growth < 1.005 else f"weight scales are {growth:.2f} × those of 8 bits"
        return f"{', '.join(self.layers)}: activations use 0..{top}, {weights}: no two products overflow 16 bits"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("extremes", "energy"):
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.zeros_like(saved, device=self.energy.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _limits(rows: Tensor, pair: int) -> Tensor:
    """The largest integer of each value of ``[channels, n]`` such that no two of a row sum to more than ``pair``."""
    largest = rows.amax(1, keepdim=True).clamp(min=0)
    others = (pair - largest).clamp(max=pair // 2)
    limits = others.expand_as(rows).clone()
    return limits.scatter_(1, rows.argmax(1, keepdim=True), pair - others)


class AgreedHistogramObserver(HistogramObserver):
    """A histogram of activations whose largest integer is agreed on with the weights they meet."""

    agreement: Agreement | None = None

    @property
    def grid(self) -> NumberFormat:
        """The integers in use; all of the spec's where nothing was agreed on."""
        if self.agreement is None:
            return self._grid
        return replace(self._grid, quant_max=self.agreement.top(), custom_range=True)

    @grid.setter
    def grid(self, value: NumberFormat) -> None:
        self._grid = value

    @property
    def quant_max(self) -> int:
        """Largest integer in use."""
        return self.grid.quant_max

    @quant_max.setter
    def quant_max(self, value: int) -> None:
        """As `grid` says."""

    @property
    def seen(self) -> tuple[float, ...]:
        """What tells one set of data from another."""
        return (self.total, float(self.min_val), float(self.max_val)) if self.observed else ()

    def noise(self) -> list[float]:
        """For each of `TOPS`, the mean squared error over the mean square of the data."""
        state = self.state
        bins, own = filling(state), self._grid
        low, high = (torch.tensor([value]) for value in mse(state, own))
        grids = [replace(own, quant_max=top, custom_range=True) for top in TOPS]
        errors = [float(expected(bins, grid, grid.qparams(low, high))) for grid in grids]
        left, right = bins.edges[:-1], bins.edges[1:]
        power = float(((left * left + left * right + right * right) / 3) @ bins.count / bins.count.sum())
        return [error / power if power > 0 else 0.0 for error in errors]


class AgreedPlaceholderObserver(PlaceholderObserver):
    """Marks activations that get their parameters at run time, with a largest integer agreed on beforehand."""

    agreement: Agreement | None = None
    seen: ClassVar[tuple[float, ...]] = ()

    @property
    def quant_max(self) -> int | None:
        """Largest integer in use."""
        return self._quant_max if self.agreement is None else self.agreement.top()

    @quant_max.setter
    def quant_max(self, value: int | None) -> None:
        self._quant_max = value

    def noise(self) -> list[float]:
        """For each of `TOPS`, what is assumed of data that nobody has seen."""
        return [_UNMEASURED * (255 / top) ** 2 for top in TOPS]


Activation = AgreedHistogramObserver | AgreedPlaceholderObserver


@dataclass(eq=False)
class Agreement:
    """Activations and the weights they meet, which share one largest activation integer.

    Mostly one tensor and the layers that read it; more where a layer is called several times.
    """

    activations: list[Activation] = field(default_factory=list)
    weights: list[PairedWeightObserver] = field(default_factory=list)
    _made: tuple[Any, int] | None = None

    def top(self) -> int:
        """The largest activation integer: the one of `TOPS` with the least noise, on the data seen so far.

        The output of a layer is a sum of products, so errors of activations and weights add to its relative noise
        each with their own: E|dx|²/E|x|² + |dW|²/|W|².
        """
        seen = tuple(activation.seen for activation in self.activations)
        if self._made is None or self._made[0] != seen:
            self._made = seen, self._choose()
        return self._made[1]

    def _choose(self) -> int:
        measured = [a for a in self.activations if a.seen or a.is_dynamic]
        weights = [w for w in self.weights if w.observed]
        if not measured or not weights:
            return TOPS[0]
        noise = torch.tensor([a.noise() for a in measured], dtype=torch.float64).mean(0)
        costs = [
            sum(float(noise[i]) + weight.noise(weight.scales(top)) for weight in weights) for i, top in enumerate(TOPS)
        ]
        best = min(range(len(TOPS)), key=costs.__getitem__)
        return TOPS[-1] if costs[best] >= costs[-1] * _CLEARLY else TOPS[best]


def link(observers: MutableMapping[EdgeOrNode, Any]) -> None:
    """Let the observers of each layer's input and weight agree on their ranges.

    ``observers``: as `Quantizer.prepare_obs_or_fq_callback` gets them; changed where a layer's weight is shared with an
    op that another quantizer annotated, a tied embedding say. Depthwise convolutions are left out: their
    kernels add in 32 bits.
    """
    _pair_weights(observers)
    for consumer, (activation, weight) in _layers(observers).items():
        agreed = [observer.agreement for observer in (activation, weight) if observer.agreement is not None]
        joined = agreed[0] if agreed else Agreement()
        for other in agreed[1:]:
            if other is not joined:
                joined.activations += other.activations
                joined.weights += other.weights
        if not any(activation is known for known in joined.activations):
            joined.activations.append(activation)
        if not any(weight is known for known in joined.weights):
            joined.weights.append(weight)
        for member in (*joined.activations, *joined.weights):
            member.agreement = joined
        weight.layers = (*weight.layers, consumer.name)


def _pair_weights(observers: MutableMapping[EdgeOrNode, Any]) -> None:
    """Exchange the observers of weights that meet our activations, and came with somebody else's spec."""
    ours = {place[1] for place, o in observers.items() if isinstance(place, tuple) and isinstance(o, Activation)}
    exchanged: dict[int, PairedWeightObserver] = {}
    for place, o in observers.items():
        if type(o) is PerChannelMinMaxObserver and isinstance(place, tuple) and place[1] in ours:
            numbers = {
                name: getattr(o, name) for name in ("dtype", "quant_min", "quant_max", "qscheme", "ch_axis", "eps")
            }
            exchanged.setdefault(id(o), PairedWeightObserver(**numbers))
    for place, o in list(observers.items()):
        observers[place] = exchanged.get(id(o), o)


def _layers(observers: Mapping[EdgeOrNode, Any]) -> dict[Node, tuple[Activation, PairedWeightObserver]]:
    inputs: dict[Node, Activation] = {}
    weights: dict[Node, PairedWeightObserver] = {}
    for place, observer in observers.items():
        if not isinstance(place, tuple):
            continue
        producer, consumer = place
        if isinstance(observer, PairedWeightObserver) and not _is_depthwise(consumer, producer):
            weights[consumer] = observer
        elif isinstance(observer, Activation):
            inputs[consumer] = observer
    return {node: (inputs[node], weight) for node, weight in weights.items() if node in inputs}


def _is_depthwise(layer: Node, weight: Node) -> bool:
    """A convolution with one input channel per group: oneDNN multiplies it one channel at a time."""
    tensor = weight.meta.get("val")
    if not short_name(layer.target).startswith("conv") or not isinstance(tensor, Tensor):
        return False
    if short_name(layer.target).startswith("conv_transpose") or operand(layer, "transposed") is True:
        return bool(tensor.shape[0] == operand(layer, "groups"))
    return tensor.shape[1] == 1
