"""Numbers of a tensor as a sequence that costs what the tensor costs: a table of groups has a hundred million scales.

TensorNumbers(tensor([0.1, 0.25])) equals (0.1, 0.25), and holds no number of Python's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from quant2e.stored_tensor import in_memory

_BLOCK = 1 << 16
"""Numbers that are Python's at one time."""


class TensorNumbers(Sequence[float]):
    """The numbers of ``tensor``, one behind the other, in the way of a tuple: equal to it, and hashed as it is.

    Floats are the shortest decimals that give each float32 back, integers are integers. It holds the tensor itself,
    whose numbers nobody changes: that of a graph, say. ``tensor`` may be a `StoredTensor`.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return self.tensor.numel()

    @overload
    def __getitem__(self, place: int) -> float: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[float, ...]: ...
    def __getitem__(self, place: int | slice) -> float | tuple[float, ...]:
        found = self.flat()[place]
        return _python(found) if isinstance(place, slice) else _python(found.reshape(1))[0]

    def __iter__(self) -> Iterator[float]:
        flat = self.flat()
        for begin in range(0, len(flat), _BLOCK):
            yield from _python(flat[begin : begin + _BLOCK])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TensorNumbers):
            return self.tensor is other.tensor or (len(self) == len(other) and _equal(self.flat(), other.flat()))
        if isinstance(other, tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self)) if len(self) <= 8 else f"({', '.join(map(repr, self[:3]))}, … {len(self)} numbers)"

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorNumbers:
        return self

    def flat(self) -> Tensor:
        """The numbers as a tensor of one dimension, float32 or integers, which may share memory with ``tensor``."""
        values: Tensor = in_memory(self.tensor)
        values = values.detach().flatten().cpu()
        return values.float() if values.is_floating_point() else values


def tensor_of(numbers: Sequence[float]) -> Tensor:
    """Numbers of either kind as a tensor of one dimension, to be looked at: float64 or int64, or as `TensorNumbers`."""
    if isinstance(numbers, TensorNumbers):
        return numbers.flat()
    floats = any(type(number) is float or abs(number) >= 1 << 63 for number in numbers)
    return torch.tensor(numbers, dtype=torch.float64 if floats else torch.int64)


def plain_numbers(numbers: Any) -> Any:
    """`TensorNumbers` as a tuple of Python's; anything else as it is."""
    return tuple(numbers) if isinstance(numbers, TensorNumbers) else numbers


def _python(values: Tensor) -> tuple[float, ...]:
    if not values.is_floating_point():
        return tuple(values.tolist())
    return tuple(float(str(value)) for value in values.numpy())


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype is not other.dtype:
        one, other = one.double(), other.double()
    return torch.equal(one, other)
