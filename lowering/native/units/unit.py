"""Units: ops of the graph that become one step of a region together, and what a step does with its result.

dq, convolution, add, relu, q        =>        one unit: reads integers, writes integers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.native.kernels.plan import Activation, RegionConstants, RegionStep, RegionTensor, StepKind
from lowering.native.units.values import (
    Integers,
    equal_shapes,
    image_of,
    integers_of,
    is_between_units,
    quantizes,
    stored,
)
from lowering.native.units.windows import Pair
from quant2e.graph.dataflow import operand, operands

aten = torch.ops.aten


@dataclass(slots=True)
class Emitter:
    """A region while its plan is written. ``values`` by the node whose result they hold."""

    gm: GraphModule
    values: list[RegionTensor] = field(default_factory=list)
    places: dict[Node, int] = field(default_factory=dict)
    steps: list[RegionStep] = field(default_factory=list)
    constants: RegionConstants = field(default_factory=RegionConstants)
    rows: bool = False

    def declare(self, node: Node, **more: Any) -> int:
        """A new value for the result of ``node``; returns its number."""
        image = image_of(node)
        assert image is not None, f"'{node.name}' was looked at before"
        integers = integers_of(node) if quantizes(node) else None
        h, w, c = image
        self.values.append(
            RegionTensor(
                floats=integers is None,
                h=h,
                w=0 if self.rows else w,
                c=c,
                zero=integers.zero if integers else 0,
                **more,
            )
        )
        self.places[node] = len(self.values) - 1
        return self.places[node]

    def enter(self, node: Node, value: RegionTensor) -> None:
        """Let ``value`` be what holds the result of ``node``."""
        self.values.append(value)
        self.places[node] = len(self.values) - 1

    def read(self, node: Node) -> int:
        """The number of the value that ``node`` made."""
        return self.places[node]

    def border(self, node: Node, pixels: Pair = (0, 0)) -> int:
        """As `read`, of integers that need so many zeros around them, rows and pixels, and `SLACK` behind the last."""
        value = self.values[self.places[node]]
        if value.argument is not None:  # of the caller, who has neither
            given = self.places[node]
            self.steps.append(RegionStep(kind=StepKind.CONCAT, x=given, y=self.declare(node)))
            value = self.values[self.places[node]]
        value.pad = max(value.pad[0], pixels[0]), max(value.pad[1], pixels[1])
        return self.places[node]

    def hand_over(self, node: Node, argument: int) -> None:
        """Let the result of ``node`` be an output, the ``argument``-th tensor of the caller."""
        made = self.places[node]
        if not self.values[made].floats:  # inside, they may have a border
            self.steps.append(RegionStep(kind=StepKind.CONCAT, x=made, y=self.declare(node)))
        self.values[self.places[node]].argument = argument


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """``nodes``: ops that it stands for. ``reads``, ``writes``: nodes whose results go in and come out; integers are
    known by their quantize op. ``emit``: adds its steps. ``products``: whether it multiplies by a weight. ``masks``:
    those of ``reads`` that may lie in memory as they do. ``passed``: ops on the way that stay, as others read them too.
    """

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    writes: tuple[Node, ...]
    emit: Callable[[Emitter], None]
    products: bool = False
    masks: tuple[Node, ...] = ()
    passed: tuple[Node, ...] = ()


ACTIVATIONS: dict[Any, Activation] = {
    aten.relu.default: Activation.RELU,
    aten.relu_.default: Activation.RELU,
    aten.relu6.default: Activation.CLAMP,
    aten.relu6_.default: Activation.CLAMP,
    aten.hardtanh.default: Activation.CLAMP,
    aten.hardtanh_.default: Activation.CLAMP,
    aten.clamp.default: Activation.CLAMP,
    aten.hardswish.default: Activation.HARDSWISH,
    aten.hardswish_.default: Activation.HARDSWISH,
    aten.hardsigmoid.default: Activation.HARDSIGMOID,
    aten.hardsigmoid_.default: Activation.HARDSIGMOID,
    aten.gelu.default: Activation.GELU,
    aten.silu.default: Activation.SILU,
    aten.silu_.default: Activation.SILU,
    aten.sigmoid.default: Activation.SIGMOID,
    aten.tanh.default: Activation.TANH,
    aten.leaky_relu.default: Activation.LEAKY_RELU,
    aten.leaky_relu_.default: Activation.LEAKY_RELU,
}
_ADD = frozenset({aten.add.Tensor, aten.add_.Tensor})
_LARGEST = 3.0e38


@dataclass(frozen=True, slots=True, kw_only=True)
class Activated:
    """An activation with its numbers: bounds of a clamp, or the slope of a leaky relu."""

    kind: Activation = Activation.NONE
    a: float = 0.0
    b: float = 0.0


def fused_activation(node: Node) -> Activated | None:
    """The activation that a node computes; None for other ops, and for what varies."""
    kind = ACTIVATIONS.get(node.target)
    if kind is None:
        return None
    if kind is Activation.GELU and operand(node, "approximate") == "tanh":
        return Activated(kind=Activation.GELU_TANH)
    if kind is Activation.LEAKY_RELU:
        return Activated(kind=kind, a=float(operand(node, "negative_slope")))
    if kind is Activation.CLAMP:
        if node.target in (aten.relu6.default, aten.relu6_.default):
            return Activated(kind=kind, a=0.0, b=6.0)
        names = ("min", "max") if node.target is aten.clamp.default else ("min_val", "max_val")
        low, high = (operand(node, name) for name in names)
        if isinstance(low, Node) or isinstance(high, Node):
            return None
        return Activated(
            kind=kind, a=-_LARGEST if low is None else float(low), b=_LARGEST if high is None else float(high)
        )
    return Activated(kind=kind)


def is_identity(node: Node) -> bool:
    """Whether a node passes its operand on: a dropout in evaluation, an alias, a copy in the same layout."""
    if node.target in (aten.dropout.default, aten.dropout_.default):
        return not operand(node, "train")
    return node.target in (aten.alias.default, aten.detach.default, aten.contiguous.default, aten.clone.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What becomes of a result: ``added`` to it (the node read, integers by their quantize op), activated, rounded.

    ``nodes``: taken into the unit. ``integers``: the quantize op whose integers are written, ``floats``: the node whose
    floats are; at least one of them.
    """

    nodes: tuple[Node, ...]
    added: Node | None
    activation: Activated
    integers: Node | None
    floats: Node | None

    @property
    def writes(self) -> tuple[Node, ...]:
        """Nodes whose results are there afterwards."""
        return tuple(node for node in (self.integers, self.floats) if node is not None)

    @property
    def reads(self) -> tuple[Node, ...]:
        """What is read besides the operands."""
        return () if self.added is None else (self.added,)


def ending_of(root: Node, taken: set[Node], *, adds: bool = True, activates: bool = True) -> Ending:
    """Follow the result of ``root`` through an addition, an activation and a quantize op, as far as a step can.

    ``taken``: ops of other units. ``adds``: whether the step can add a tensor, ``activates``: whether it can activate.
    """
    last, nodes, added = root, [], None
    activation = Activated()
    while len(last.users) == 1:
        user = next(iter(last.users))
        if user in taken:
            break
        if is_identity(user):
            pass
        elif (
            adds and added is None and activation.kind is Activation.NONE and (other := _addend(user, last)) is not None
        ):
            added = other
            nodes += [other] if stored(other) is not None else []
        elif activates and activation.kind is Activation.NONE and (found := fused_activation(user)) is not None:
            activation = found
        else:
            break
        last = user
        nodes.append(user)
    quantized = [user for user in last.users if is_between_units(user) and user not in taken]
    integers = quantized[0] if quantized else None
    nodes += quantized[:1]
    floats = None if integers is not None and len(last.users) == 1 else last
    source = None if added is None else stored(added) or added
    return Ending(nodes=tuple(nodes), added=source, activation=activation, integers=integers, floats=floats)


def _addend(node: Node, value: Node) -> Node | None:
    """What ``node`` adds to ``value``: a tensor of the same shape, once."""
    if node.target not in _ADD or operand(node, "alpha") != 1:
        return None
    given = operands(node)
    one, two = given["self"], given["other"]
    other = two if one is value else one
    if not isinstance(other, Node) or other is value or image_of(other) is None:
        return None
    wanted = node.meta["val"].shape
    same = all(equal_shapes(wanted, read.meta["val"].shape) for read in (value, other))
    return other if same else None


def describe_operand(step: RegionStep, emitter: Emitter, place: str, node: Node) -> None:
    """Let ``step`` read ``node`` as its ``x``, ``other`` or ``third``: floats, or integers with their scale."""
    setattr(step, place, emitter.read(node))
    integers = integers_of(node) if quantizes(node) else None
    if integers is not None:
        setattr(step, f"{place}_scale", integers.scale)
        setattr(step, f"{place}_zero", integers.zero)


def finish(
    emitter: Emitter, step: RegionStep, ending: Ending, *, fast: bool = False, parts: Sequence[RegionStep] = ()
) -> None:
    """Fill in what a step does with its result, and add it. ``fast``: scales are divided by that of y already.

    ``parts``: steps that write the rest of the same result.
    """
    step.activation, step.a, step.b = ending.activation.kind, ending.activation.a, ending.activation.b
    if ending.added is not None:
        step.other = emitter.border(ending.added) if quantizes(ending.added) else emitter.read(ending.added)
        added = integers_of(ending.added)
        if quantizes(ending.added) and added is not None:
            step.other_scale, step.other_zero = added.scale, added.zero
    if ending.integers is not None:
        integers = integers_of(ending.integers)
        assert integers is not None, "it quantizes"
        step.y, step.inverse, step.zero = emitter.declare(ending.integers), integers.inverse, integers.zero
        step.low, step.high = bounds(integers, ending.activation) if fast else (integers.low, integers.high)
        step.other_scale /= integers.scale if fast else 1.0
    if ending.floats is not None:
        step.z = emitter.declare(ending.floats)
    step.fast = int(fast)
    for part in parts:
        for name in _OF_RESULT:
            setattr(part, name, getattr(step, name))
    emitter.steps += [step, *parts]


_OF_RESULT = (
    "other", "other_scale", "other_zero", "y", "z", "fast", "activation", "a", "b", "inverse", "zero", "low", "high",
)  # fmt: skip
"""What `finish` fills in."""


CLAMPS = frozenset({Activation.NONE, Activation.RELU, Activation.CLAMP})
"""Activations that bound the integers, and do nothing else."""


def bounds(integers: Integers, activation: Activated) -> tuple[int, int]:
    """The integers between which a clamp leaves a result."""
    low, high = integers.low, integers.high
    if activation.kind is Activation.RELU:
        low = max(low, integers.zero)
    if activation.kind is Activation.CLAMP:
        low, high = max(low, integers.nearest(activation.a)), min(high, integers.nearest(activation.b))
        low, high = min(low, integers.high), max(high, integers.low)
    return low, high
