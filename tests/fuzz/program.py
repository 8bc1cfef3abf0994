"""Programs of the fuzzer: as those of the conformance check, with kinds of values, masks, state, and sizes that vary.

A program is text, and text is a program: what the fuzzer found is kept as what it printed.

x0: float32[2, 4, 8, 8] outlier
x1: bool[2, 4, 8, 8]
batch varies
v0 = conv2d.default(x0, weight[8, 4, 3, 3], bias[8], [1, 1], [1, 1])
v1 = masked_fill.Scalar(v0, x1, -1.0)
return v1
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.conformance.program import Given, Program, RandomWeight, Ref, Step
from tests.fuzz.functions import FUNCTIONS


def _one_outlier(x: Tensor) -> Tensor:
    return torch.cat([x.flatten()[:1] * 100, x.flatten()[1:]]).view(x.shape)


VALUES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "positive": torch.abs,
    "negative": lambda x: -x.abs(),
    "far": lambda x: x + 10,
    "outlier": _one_outlier,
    "small": lambda x: x * 0.01,
    "large": lambda x: x * 1e5,
    "zeros": torch.zeros_like,
    "equal": lambda x: torch.full_like(x, 0.7),
    "whole": torch.round,
}
"""Kinds of values, made of values from a normal distribution."""

PLAIN = frozenset({"normal", "positive", "negative"})
"""Kinds whose rounding errors are spread as uniform noise is, and whose results are near 1."""


@dataclass(frozen=True, slots=True)
class Values(Given):
    """An input: floats of a kind, truth values, or integers below a limit."""

    kind: str = "normal"
    """A key of `VALUES`, or "bool"."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool if self.kind == "bool" else Given.dtype.fget(self)

    def sample(self, generator: torch.Generator) -> Tensor:
        if self.kind == "bool":
            return torch.rand(self.shape, generator=generator) < 0.7
        drawn = Given.sample(self, generator)  # a class with slots has no super() of its own
        return drawn if self.limit else VALUES[self.kind](drawn).contiguous()

    def __str__(self) -> str:
        if self.kind == "bool":
            return f"bool{list(self.shape)}"
        return f"int64{list(self.shape)} below {self.limit}" if self.limit else f"float32{list(self.shape)} {self.kind}"


_WEIGHTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "weight": lambda w: w,
    "weight_outlier": lambda w: torch.cat([w[:1] * 50, w[1:]]),
    "weight_zero": lambda w: torch.cat([w[:1] * 0, w[1:]]),
    "weight_tiny": lambda w: w * 1e-5,
    "weight_equal": lambda w: torch.full_like(w, 0.5 / math.sqrt(w[0].numel())),
    "weight_negative": lambda w: -w.abs(),
}
ROLES = (*_WEIGHTS, "bias", "scale", "variance", "state")
"""What a parameter is; ``state`` is a buffer that calls write to, and ``variance`` one that none does."""


@dataclass(frozen=True, slots=True)
class Parameter(RandomWeight):
    """A parameter or buffer, whose values its shape and role give."""

    def sample(self, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(self.shape, generator=generator)
        match self.role:
            case "bias":
                return nn.Parameter(drawn / 2)
            case "scale":
                return nn.Parameter(1 + drawn.abs() / 4)
            case "variance":
                return 0.5 + drawn.abs()
            case "state":
                return torch.zeros(self.shape)
        fan_in = math.prod(self.shape[1:])
        return nn.Parameter(_WEIGHTS[self.role](drawn / math.sqrt(max(fan_in, 1))))


@dataclass(frozen=True, slots=True)
class FuzzProgram(Program):
    """``varies``: the first size of every input is any."""

    varies: bool = False

    @classmethod
    def of(cls, program: Program, *, varies: bool = False) -> FuzzProgram:
        """A program with parameters and inputs of ours."""
        inputs = tuple(g if isinstance(g, Values) else Values(g.shape, g.limit) for g in program.inputs)
        steps = tuple(step.changed(_own) for step in program.steps)
        return cls(inputs, steps, program.outputs, varies)

    @property
    def plain(self) -> bool:
        """Whether its values are such that errors are those of a model of noise."""
        kinds = all(getattr(given, "kind", "normal") in {*PLAIN, "bool"} for given in self.inputs)
        return kinds and all(role in {"weight", "bias", "scale", "variance"} for role in self.roles())

    def roles(self) -> list[str]:
        """Of its parameters and buffers."""
        return [item.role for step in self.steps for item in operands(step) if isinstance(item, RandomWeight)]

    @property
    def has_state(self) -> bool:
        """Whether a call leaves something behind."""
        return "state" in self.roles()

    def resized(self, first: int) -> FuzzProgram:
        """The same program for inputs whose first size is another."""
        return replace(self, inputs=tuple(replace(g, shape=(first, *g.shape[1:])) for g in self.inputs))

    def __str__(self) -> str:
        *lines, last = Program.__str__(self).splitlines()
        if self.varies:
            lines.insert(len(self.inputs), "batch varies")
        return "\n".join([*lines, last])


def operands(step: Step) -> list[Any]:
    """What a step is called with, flat."""
    found: list[Any] = []
    step.changed(found.append)
    return found


def _own(item: Any) -> Any:
    return Parameter(item.shape, 1, item.role) if isinstance(item, RandomWeight) else item


class _Names(dict[str, Any]):
    """What the names in a line stand for."""

    def __init__(self, inputs: int) -> None:
        super().__init__(torch=torch, device=torch.device, inf=math.inf, nan=math.nan)
        self._inputs = inputs

    def __missing__(self, name: str) -> Any:
        if name in ROLES:
            return _Role(name)
        if re.fullmatch(r"[xv]\d+", name):
            return Ref(int(name[1:]) + (self._inputs if name[0] == "v" else 0))
        if name == "getitem":
            return _call(operator.getitem)
        return _call(FUNCTIONS[name]) if name in FUNCTIONS else _Packet(name)


class _Role:
    def __init__(self, role: str) -> None:
        self._role = role

    def __getitem__(self, shape: Any) -> Parameter:
        return Parameter(shape if isinstance(shape, tuple) else (shape,), 1, self._role)


class _Packet:
    def __init__(self, name: str) -> None:
        self._packet = getattr(torch.ops.aten, name)

    def __getattr__(self, overload: str) -> Any:
        return _call(getattr(self._packet, overload))


def _call(target: Any) -> Callable[..., Step]:
    return lambda *args, **kwargs: Step(target, args, tuple(kwargs.items()))


_INPUT = re.compile(r"x\d+: (?P<dtype>\w+)\[(?P<shape>[\d, ]*)\](?: below (?P<limit>\d+)| (?P<kind>\w+))?")


def parse(text: str) -> FuzzProgram:
    """The program that prints as ``text``."""
    inputs: list[Values] = []
    steps: list[Step] = []
    outputs: tuple[int, ...] = ()
    for line in filter(None, map(str.strip, text.splitlines())):
        names = _Names(len(inputs))
        if found := _INPUT.fullmatch(line):
            shape = tuple(map(int, filter(None, found["shape"].split(","))))
            kind = "bool" if found["dtype"] == "bool" else found["kind"] or "normal"
            inputs.append(Values(shape, int(found["limit"] or 0), kind))
        elif line.startswith("return "):
            outputs = tuple(names[name.strip()].index for name in line.removeprefix("return ").split(","))
        elif line != "batch varies":
            steps.append(eval(line.partition(" = ")[2], {"__builtins__": {}}, names))
    return FuzzProgram(tuple(inputs), tuple(steps), outputs, "batch varies" in text)
