"""Generated programs, as values: straight-line calls of ATen ops that print, run, and can be made smaller.

x0: float32[2, 4, 8, 8]
v0 = conv2d.default(x0, weight[8, 4, 3, 3], bias[8], [1, 1], [1, 1])
v1 = relu.default(v0)
return v1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of that number: first the inputs of the program, then the results of its steps."""

    index: int


@dataclass(frozen=True, slots=True)
class RandomWeight:
    """A parameter of its own. ``fan_in``: how many products one output sums up, so that results stay near 1."""

    shape: Shape
    fan_in: int = 1
    role: str = "weight"

    def sample(self, generator: torch.Generator) -> Tensor:
        """Its values; what is no `nn.Parameter` becomes a buffer."""
        return nn.Parameter(torch.randn(self.shape, generator=generator) / math.sqrt(self.fan_in))

    def __str__(self) -> str:
        return f"{self.role}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Given:
    """An input of the program: floats from a normal distribution, or integers ``0..limit-1`` where there is a limit."""

    shape: Shape
    limit: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return torch.int64 if self.limit else torch.float32

    def sample(self, generator: torch.Generator) -> Tensor:
        """One tensor of that kind."""
        if self.limit:
            return torch.randint(self.limit, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)

    def __str__(self) -> str:
        return f"{'int64' if self.limit else 'float32'}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Step:
    """One call. Operands are `Ref`, `RandomWeight`, literals, or lists of them."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The name of an op without its namespace, or of a function."""
        named = isinstance(self.target, OpOverload)
        return str(self.target).removeprefix("aten.") if named else str(getattr(self.target, "__name__", self.target))

    def refs(self) -> Iterator[int]:
        """Numbers of the values it reads, as often as it reads them."""
        for item in _leaves((self.args, tuple(value for _, value in self.kwargs))):
            if isinstance(item, Ref):
                yield item.index

    def changed(self, change: Callable[[Any], Any]) -> Step:
        """The same call with every operand put through ``change``."""
        return replace(
            self, args=_mapped(self.args, change), kwargs=tuple((k, _mapped(v, change)) for k, v in self.kwargs)
        )

    def call(self, value: Callable[[Any], Any]) -> Any:
        """The result, with ``value`` telling what `Ref` and `RandomWeight` stand for."""
        step = self.changed(lambda item: value(item) if isinstance(item, Ref | RandomWeight) else item)
        return step.target(*step.args, **dict(step.kwargs))


def _leaves(items: Any) -> Iterator[Any]:
    for item in items if isinstance(items, tuple | list) else (items,):
        if isinstance(item, tuple | list):
            yield from _leaves(item)
        else:
            yield item


def _mapped(items: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(items, tuple | list):
        return type(items)(_mapped(item, change) for item in items)
    return change(items)


@dataclass(frozen=True, slots=True)
class Program:
    """``inputs``, ``steps`` and the numbers of the values it returns."""

    inputs: tuple[Given, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def module(self, seed: int = 0) -> nn.Module:
        """A module that computes the program, in eval mode, with parameters made from ``seed``."""
        return _Module(self, seed).eval()

    def batches(self, count: int, seed: int = 0) -> list[tuple[Tensor, ...]]:
        """Inputs for ``count`` calls."""
        generator = torch.Generator().manual_seed(seed + 1)
        return [tuple(given.sample(generator) for given in self.inputs) for _ in range(count)]

    def __str__(self) -> str:
        lines = [f"x{i}: {given}" for i, given in enumerate(self.inputs)]
        for number, step in enumerate(self.steps):
            target = step.name
            parts = [self._spelled(a) for a in step.args] + [f"{k}={self._spelled(v)}" for k, v in step.kwargs]
            lines.append(f"v{number} = {target}({', '.join(parts)})")
        return "\n".join([*lines, f"return {', '.join(map(self._name, self.outputs))}"])

    def _name(self, index: int) -> str:
        return f"x{index}" if index < len(self.inputs) else f"v{index - len(self.inputs)}"

    def _spelled(self, item: Any) -> str:
        if isinstance(item, tuple | list):
            return f"[{', '.join(map(self._spelled, item))}]"
        if isinstance(item, Ref):
            return self._name(item.index)
        return str(item) if isinstance(item, RandomWeight) else repr(item)

    def smaller(self, shapes: Sequence[Shape | None]) -> Iterator[Program]:
        """Programs with one output only, or one step less; the result of a step that goes becomes an input.

        ``shapes``: of every value, None for what cannot be an input (integers, lists of tensors).
        """
        for output in self.outputs if len(self.outputs) > 1 else ():
            yield self._pruned((output,))
        for number in reversed(range(len(self.steps))):
            shape = shapes[len(self.inputs) + number]
            if shape is not None:
                yield self._without(number, shape)

    def _without(self, number: int, shape: Shape) -> Program:
        old, new = len(self.inputs) + number, len(self.inputs)

        def moved(index: int) -> int:
            if index == old:
                return new
            return index if index < new else index + 1 if index < old else index

        steps = tuple(
            step.changed(lambda item: Ref(moved(item.index)) if isinstance(item, Ref) else item)
            for i, step in enumerate(self.steps)
            if i != number
        )
        # What the step read is returned in its place, or nothing would be left of a chain without its last op.
        left = [i for out in self.outputs for i in (self.steps[number].refs() if out == old else (out,))]
        grown = replace(
            self, inputs=(*self.inputs, Given(shape)), steps=steps, outputs=tuple(dict.fromkeys(map(moved, left)))
        )
        return grown._pruned(grown.outputs)

    def _pruned(self, outputs: tuple[int, ...]) -> Program:
        """Without what no output needs, and without outputs that are inputs as they came."""
        needed = {i for i in outputs if i >= len(self.inputs)} or set(outputs)
        for number in reversed(range(len(self.steps))):
            if len(self.inputs) + number in needed:
                needed |= set(self.steps[number].refs())
        kept = sorted(needed)
        place = {old: new for new, old in enumerate(kept)}
        steps = tuple(
            step.changed(lambda item: Ref(place[item.index]) if isinstance(item, Ref) else item)
            for number, step in enumerate(self.steps)
            if len(self.inputs) + number in needed
        )
        inputs = tuple(given for i, given in enumerate(self.inputs) if i in needed)
        return replace(self, inputs=inputs, steps=steps, outputs=tuple(place[i] for i in outputs if i in place))


class _Module(nn.Module):
    def __init__(self, program: Program, seed: int) -> None:
        super().__init__()
        self._program = program
        generator = torch.Generator().manual_seed(seed)
        for number, step in enumerate(program.steps):
            for place, item in enumerate(_leaves((step.args, tuple(v for _, v in step.kwargs)))):
                if isinstance(item, RandomWeight):
                    name, values = f"{item.role}_{number}_{place}", item.sample(generator)
                    if isinstance(values, nn.Parameter):
                        self.register_parameter(name, values)
                    else:
                        self.register_buffer(name, values)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values: list[Any] = list(inputs)
        parameters: Mapping[str, Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for number, step in enumerate(self._program.steps):
            values.append(_named_weights(step, number, parameters).call(lambda ref: values[ref.index]))
        return tuple(values[i] for i in self._program.outputs)


def _named_weights(step: Step, number: int, parameters: Mapping[str, Tensor]) -> Step:
    """The step with its parameters in place of their descriptions."""
    place = -1

    def change(item: Any) -> Any:
        nonlocal place
        place += 1
        return parameters[f"{item.role}_{number}_{place}"] if isinstance(item, RandomWeight) else item

    return step.changed(change)
