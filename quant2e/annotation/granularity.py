"""Granularities: which elements of a tensor share a scale, in PT2E's words, and the block that each choice means.

A block size has one entry per dimension: the elements of one such block share their parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quant2e.errors import AnnotationError


@dataclass(frozen=True)
class Granularity:
    """Common ancestor of the granularities."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerAxis(Granularity):
    """One scale per index of ``axis``."""

    axis: int


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale per ``group_size`` neighbours along the last dimension."""

    group_size: int


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale per vector along the last dimension, found at run time."""


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale per vector along ``dim``: all other dimensions keep theirs."""

    dim: int = -1


def get_block_size(input_shape: Sequence[int], granularity: Granularity) -> tuple[int, ...]:
    """The block that shares one scale in a tensor of that shape; one entry per dimension.

    Raises `AnnotationError` when an axis does not exist or a group does not divide the last dimension.
    """
    shape = tuple(input_shape)
    if isinstance(granularity, PerTensor):
        return shape
    if isinstance(granularity, PerAxis):
        axis = _axis(granularity.axis, shape)
        return tuple(1 if i == axis else size for i, size in enumerate(shape))
    if isinstance(granularity, PerRow):
        axis = _axis(granularity.dim, shape)
        return tuple(size if i == axis else 1 for i, size in enumerate(shape))
    if not shape:
        raise AnnotationError(f"{granularity} needs a last dimension, and a scalar has none")
    ones = (1,) * (len(shape) - 1)
    if isinstance(granularity, PerToken):
        return (*ones, shape[-1])
    if isinstance(granularity, PerGroup):
        if granularity.group_size < 1 or shape[-1] % granularity.group_size:
            raise AnnotationError(
                f"groups of {granularity.group_size} do not divide the last dimension, {shape[-1]} of {list(shape)}"
            )
        return (*ones, granularity.group_size)
    raise AnnotationError(f"unknown granularity {granularity!r}: use PerTensor, PerAxis, PerGroup, PerToken or PerRow")


DYNAMIC: tuple[Granularity, ...] = (PerTensor(), PerToken(), PerAxis(0))
"""What may share a scale that is found at run time: the tensor, a token, or what has one index along the first
dimension, an image of a batch."""


def granularity_text(granularity: Granularity) -> str:
    """A granularity of `DYNAMIC` behind the word dynamic: nothing for a whole tensor."""
    return {DYNAMIC[1]: " per token", DYNAMIC[2]: " per image"}.get(granularity, "")


def _axis(axis: int, shape: tuple[int, ...]) -> int:
    if not -len(shape) <= axis < len(shape):
        raise AnnotationError(f"axis {axis} does not exist in a tensor of shape {list(shape)}")
    return axis % len(shape)
