"""ObserverBase and observer factories: what every observer is, and how specs carry one that is yet to be made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.fx import Node

from quant2e.observers.keywords import check_keywords, check_when_made

OBSERVER_PREFIX = "activation_post_process_"
"""Submodules of this name are observers: the name that tools of the ecosystem look for."""


def is_observer_call(node: Node) -> bool:
    """Whether a node of a prepared graph calls an observer or a fake-quantizer."""
    return node.op == "call_module" and str(node.target).startswith(OBSERVER_PREFIX)


def observed(node: Node) -> Node:
    """What a node stands for without the observers in front of it: the observed tensor of a call of an observer."""
    while is_observer_call(node):
        node = node.all_input_nodes[0]
    return node


def inner_observer(observer: Any) -> Any:
    """The observer inside a fake-quantize module; the observer itself otherwise."""
    return getattr(observer, "activation_post_process", observer)


@runtime_checkable
class LimitedIntegers(Protocol):
    """An observer of weights whose integers a kernel bounds together: it adds some of their products in few bits.

    Its scales leave room for the nearest integers, so nobody may choose others.
    """

    def integer_limits(self, nearest: Tensor) -> tuple[Tensor, Tensor] | None:
        """The smallest and the largest integer of each value, of its shape, within which all fit; None: any do.

        ``nearest``: the weight's nearest integers, as floats, which fit.
        """


def integer_limits(observer: Any, nearest: Tensor) -> tuple[Tensor, Tensor] | None:
    """What `LimitedIntegers.integer_limits` of the observer says that measured a weight; None where it knows none."""
    inner = inner_observer(observer)
    return inner.integer_limits(nearest) if isinstance(inner, LimitedIntegers) else None


class ObserverFactory:
    """Makes observers with given keyword arguments; what ``with_args`` returns.

    Raises `AnnotationError` for a keyword that the class does not take, with the nearest that it does.
    Two factories are equal, and have equal hashes, when they make the same class with equal arguments; so specs
    that hold equal factories are equal.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        kwargs: Mapping[str, Any] | None = None,
        callable_args: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        self._make = make
        self._kwargs = dict(kwargs or {})
        self._callable_args = dict(callable_args or {})
        check_keywords(make, {**self._kwargs, **self._callable_args})

    @property
    def p(self) -> partial[Any]:
        """The class and its arguments; PT2E tools read the class as ``factory.p.func``."""
        return partial(self._make, **self._kwargs)

    def with_args(self, **kwargs: Any) -> ObserverFactory:
        """The same with further, or other, arguments."""
        return ObserverFactory(self._make, {**self._kwargs, **kwargs}, self._callable_args)

    def with_callable_args(self, **kwargs: Callable[[], Any]) -> ObserverFactory:
        """The same with arguments that are computed each time an observer is made."""
        return ObserverFactory(self._make, self._kwargs, {**self._callable_args, **kwargs})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        late = {name: make() for name, make in self._callable_args.items() if name not in kwargs}
        return self._make(*args, **{**self._kwargs, **late, **kwargs})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ObserverFactory):
            return NotImplemented
        mine = (self._make, self._kwargs, self._callable_args)
        return mine == (other._make, other._kwargs, other._callable_args)

    def __hash__(self) -> int:
        # Names only: an argument may be unhashable, and equal factories have equal names.
        return hash((self._make, frozenset(self._kwargs), frozenset(self._callable_args)))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in {**self._kwargs, **self._callable_args}.items())
        return f"{getattr(self._make, '__name__', self._make)}.with_args({arguments})"


class ObserverBase(nn.Module, ABC):
    """Base of all observers: ``forward`` returns its input and may look at it, `calculate_qparams` tells the result.

    Attributes that converters read: ``dtype, is_dynamic, quant_min, quant_max, qscheme, ch_axis, eps``.
    """

    dtype: torch.dtype
    is_dynamic: bool
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_when_made(cls)

    def __init__(self, dtype: torch.dtype, is_dynamic: bool = False) -> None:
        super().__init__()
        self.dtype = dtype
        self.is_dynamic = bool(is_dynamic)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself."""

    @abstractmethod
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point. Raises `CalibrationError` when there are none."""

    @classmethod
    def with_args(cls, **kwargs: Any) -> ObserverFactory:
        """A factory of observers of this class with these arguments."""
        return ObserverFactory(cls, kwargs)

    @classmethod
    def with_callable_args(cls, **kwargs: Callable[[], Any]) -> ObserverFactory:
        """A factory of observers of this class with arguments computed each time one is made."""
        return ObserverFactory(cls, callable_args=kwargs)
