"""Blocks of rows: what is computed row by row of a large weight needs no second copy of it in floats.

Such a copy is more than the peak of memory: the allocator keeps its place, between smaller tensors that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

VALUES = 2**18
"""Values of a block: a megabyte of floats, and few enough blocks that a call for each takes no time."""


def row_blocks(rows: int, values: int) -> Iterator[slice]:
    """Slices of ``rows`` rows that hold ``values`` values in all: blocks of at most `VALUES`, or of one row."""
    step = max(1, VALUES * rows // max(values, 1))
    return (slice(first, min(first + step, rows)) for first in range(0, max(rows, 1), step))


def by_blocks(
    compute: Callable[..., Tensor],
    x: Tensor,
    parameters: Sequence[Any],
    by_row: bool,
    others: Sequence[Any],
    dtype: Any,
) -> Tensor:
    """``compute(x, *parameters, *others)``, of the shape of ``x`` and ``dtype``, in blocks along its first dimension.

    ``compute`` gives a slice along that from the same slice of ``x``, and of ``parameters`` where these have a value
    for each row (``by_row``). The result is made before any temporary, so that none of these leaves its place free in
    front of it.
    """
    if x.dim() == 0:
        return compute(x, *parameters, *others)
    made = torch.empty_like(x, dtype=dtype)
    for rows in row_blocks(x.shape[0], x.numel()):
        made[rows] = compute(x[rows], *(one[rows] if by_row else one for one in parameters), *others)
    return made
