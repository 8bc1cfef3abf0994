"""StoredTensor: a weight that lies in a file, or in fewer bytes, and is read whenever an op needs its values.

    op(w)        =>        op(read(w))        and the values are dropped behind the op

It knows its shape and dtype, so that a model that holds such weights is captured, annotated and reported without one of
them in memory, and runs with one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

_SAME = frozenset({torch.ops.aten.detach.default, torch.ops.aten.alias.default})
"""Ops whose result is the weight itself."""

OWN_WAY: dict[Any, Callable[..., Tensor | None]] = {}
"""By op: what computes it without all the values at once, where the first operand is a stored weight; None where it
does not, and the op is called.
"""


class TensorSource(Protocol):
    """Where a weight lies. ``str`` names it, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    def read(self) -> Tensor:
        """Its values, in memory of their own, of any dtype."""

    def written(self, by: str) -> Exception:
        """The error of an op that would write to it."""


class StoredTensor(Tensor):
    """A weight that lies at ``place``, with the dtype that the model has it in; on the CPU, contiguous.

    Ops on it give plain tensors. It cannot be written to. Copies and pickles of it name the same place.
    """

    place: TensorSource

    @staticmethod
    def __new__(cls: type[Self], place: TensorSource, dtype: torch.dtype) -> Self:
        made = Tensor._make_wrapper_subclass(cls, place.shape, dtype=dtype, device=torch.device("cpu"))
        made.place = place
        return made

    def read(self) -> Tensor:
        """The values, in memory of their own. Raises what its place raises."""
        return self.place.read().to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves its types out
        return f"StoredTensor({self.place}, {list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredTensor:
        if id(self) not in memo:
            memo[id(self)] = _made(self.place, self.dtype, isinstance(self, nn.Parameter), self.requires_grad)
        found: StoredTensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _made, (self.place, self.dtype, isinstance(self, nn.Parameter), self.requires_grad)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares one that is switched off
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an op on the values."""
        if func in _SAME:
            return cls(args[0].place, args[0].dtype)
        kwargs = dict(kwargs or {})
        for weight in _written(func, args, kwargs):
            raise weight.place.written(str(func))
        if func in OWN_WAY and isinstance(args[0], StoredTensor):
            computed = OWN_WAY[func](*args, **kwargs)
            if computed is not None:
                return computed
        values: dict[int, Tensor] = {}

        def read(leaf: Any) -> Any:
            if not isinstance(leaf, StoredTensor):
                return leaf
            if id(leaf) not in values:
                values[id(leaf)] = leaf.read()
            return values[id(leaf)]

        args, kwargs = pytree.tree_map(read, (args, kwargs))
        return func(*args, **kwargs)


def _made(place: TensorSource, dtype: torch.dtype, is_parameter: bool, requires_grad: bool) -> StoredTensor:
    weight = StoredTensor(place, dtype)
    return nn.Parameter(weight, requires_grad=requires_grad) if is_parameter else weight  # type: ignore[return-value]


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[StoredTensor]:
    """Stored weights among the operands that an op writes to."""
    for index, argument in enumerate(func._schema.arguments if isinstance(func, OpOverload) else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, StoredTensor))


def in_memory(value: Any) -> Any:
    """``value``, or the values of a weight that lies in a file, read now."""
    return value.read() if isinstance(value, StoredTensor) else value


def stored_in(module: nn.Module) -> bool:
    """Whether a parameter or buffer of ``module`` is a stored weight."""
    return any(isinstance(tensor, StoredTensor) for tensor in (*module.parameters(), *module.buffers()))


def read_stored(module: nn.Module, *, besides: tuple[type[Any], ...] = ()) -> int:
    """Read every stored weight that ``module`` holds, in place, one after the other; returns how many bytes they take.

    ``besides``: kinds of places whose weights stay there. Tied weights stay tied.
    """
    known: dict[int, Tensor] = {}
    for owner in module.modules():
        tables: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers, vars(owner))
        for table in tables:
            for name, value in list(table.items()):
                if not isinstance(value, StoredTensor) or isinstance(value.place, besides):
                    continue
                if id(value) not in known:
                    plain = value.read()
                    is_parameter = isinstance(value, nn.Parameter)
                    known[id(value)] = nn.Parameter(plain, value.requires_grad) if is_parameter else plain
                table[name] = known[id(value)]
    return sum(math.prod(tensor.shape) * tensor.itemsize for tensor in known.values())
