"""Program builder: values with their shapes, and choices that somebody else makes.

Whoever chooses (Hypothesis, or a random number generator) gets a list of options, the simplest first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantizers.conformance.program import Given, Program, RandomWeight, Ref, Shape, Step

T = TypeVar("T")

MOST_VALUES = 4096
"""Results with more numbers than this are not used: graphs are small, so that many fit into a second."""

SHAPES: dict[int, tuple[Shape, ...]] = {
    1: ((8,),),
    2: ((4, 8), (3, 32), (1, 8)),
    3: ((2, 4, 8), (1, 5, 32), (2, 8, 6)),
    4: ((2, 4, 8, 8), (1, 3, 6, 6), (2, 8, 5, 7), (1, 1, 8, 8)),
    5: ((1, 2, 4, 4, 4),),
}
"""Shapes of inputs, by rank."""


class UnfitError(Exception):
    """An op that cannot be called where it was tried; the builder is as it was before."""


class ProgramBuilder:
    """``choose`` picks one of a sequence of options."""

    def __init__(self, choose: Callable[[Sequence[Any]], Any]) -> None:
        self._choose = choose
        self._inputs: dict[int, Given] = {}
        self._steps: dict[int, Step] = {}
        self._values: dict[int, Any] = {}

    def choose(self, options: Sequence[T]) -> T:
        """One of the options. Raises `UnfitError` when there are none."""
        if not options:
            raise UnfitError
        picked: T = self._choose(options)
        return picked

    def shape(self, ref: Ref) -> Shape:
        """The shape of a value that is a tensor."""
        return tuple(self._values[ref.index].shape)

    def floats(self, *, rank: int | None = None, shape: Shape | None = None) -> list[Ref]:
        """Values that are float tensors of that rank or shape, the latest first."""
        return [
            Ref(index)
            for index, value in reversed(self._values.items())
            if isinstance(value, Tensor)
            and value.is_floating_point()
            and (rank is None or value.dim() == rank)
            and (shape is None or tuple(value.shape) == shape)
        ]

    def input(self, shape: Shape, limit: int = 0) -> Ref:
        """A new input."""
        index = len(self._values)
        self._inputs[index] = Given(shape, limit)
        self._values[index] = torch.empty(shape, device="meta", dtype=torch.int64 if limit else torch.float32)
        return Ref(index)

    def pick(self, *, rank: int | None = None, shape: Shape | None = None) -> Ref:
        """A float value of that rank or shape: the latest, an earlier one, or a new input."""
        known = self.floats(rank=rank, shape=shape)[:3]
        # A second operand of the same shape is often the first one itself, unless something new is as likely.
        found = self.choose([None, *known, None] if shape is not None else [*known[:1], *known, None])
        if found is not None:
            return found
        return self.input(shape or self.choose(SHAPES[self.choose([4, 3, 2]) if rank is None else rank]))

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        """The result of a call. Raises `UnfitError` when torch refuses it, or the result is empty or large."""
        step = Step(target, args, tuple(kwargs.items()))
        try:
            with torch.no_grad():
                result = step.call(self._meta)
        except Exception as error:
            raise UnfitError(str(error)) from error
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and not 0 < tensor.numel() <= MOST_VALUES:
                raise UnfitError
        index = len(self._values)
        self._steps[index], self._values[index] = step, result
        return Ref(index)

    def _meta(self, item: Ref | RandomWeight) -> Any:
        return self._values[item.index] if isinstance(item, Ref) else torch.empty(item.shape, device="meta")

    def state(self) -> tuple[int, ...]:
        """What `back_to` returns to."""
        return (len(self._values),)

    def back_to(self, state: tuple[int, ...]) -> None:
        """Forget the values that came after ``state``."""
        for store in (self._inputs, self._steps, self._values):
            for index in [i for i in store if i >= state[0]]:
                del store[index]

    @property
    def size(self) -> int:
        """How many calls there are."""
        return len(self._steps)

    def finish(self, extra: Sequence[Ref] = ()) -> tuple[Program, list[Shape | None]]:
        """The program, which returns every tensor that nothing reads and ``extra``; and the shapes of its values."""
        read = {index for step in self._steps.values() for index in step.refs()}
        loose = [i for i in self._steps if i not in read and isinstance(self._values[i], Tensor)]
        returned = [*loose, *(ref.index for ref in extra)]
        order = [*self._inputs, *self._steps]
        place = {old: new for new, old in enumerate(order)}
        steps = tuple(
            step.changed(lambda item: Ref(place[item.index]) if isinstance(item, Ref) else item)
            for step in self._steps.values()
        )
        program = Program(tuple(self._inputs.values()), steps, tuple(place[i] for i in returned))
        return program, [_float_shape(self._values[i]) for i in order]


def shapes_of(program: Program) -> list[Shape | None]:
    """The shapes of all values of a program; None for what is no float tensor."""
    values: list[Any] = [torch.empty(g.shape, device="meta", dtype=g.dtype) for g in program.inputs]
    for step in program.steps:
        values.append(
            step.call(
                lambda item: values[item.index] if isinstance(item, Ref) else torch.empty(item.shape, device="meta")
            )
        )
    return [_float_shape(value) for value in values]


def _float_shape(value: Any) -> Shape | None:
    return tuple(value.shape) if isinstance(value, Tensor) and value.is_floating_point() else None
