"""When an observer's update can be the kernel's, and the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant2e import native
from quant2e.histogram import Histogram
from quant2e.ranges import MinMax, MovingAverage, sentinel_of

WORTH_LOADING = 1 << 16
"""Tensors with fewer values do not cause the kernel to be loaded; once it is, they use it as well."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def kernel_of(estimator: Any) -> tuple[str, tuple[Any, ...]]:
    """Name of the kernel's function for an estimator and its last arguments; an empty name when there is none."""
    if getattr(estimator, "axis", None) is not None or getattr(estimator, "group_size", None) is not None:
        return "", ()
    if type(estimator) is MinMax:
        return "quant2e_minmax", ()
    if type(estimator) is MovingAverage:
        return "quant2e_average", (estimator.averaging_constant,)
    if type(estimator) is Histogram:
        return "quant2e_histogram", (estimator.bins,)
    return "", ()


def native_update(observer: Any, x: Tensor) -> bool:
    """Update the buffers of ``observer`` with ``x`` by the kernel; False when that is not possible here."""
    if type(x) is not Tensor or x.dtype not in _FLOATS or torch.compiler.is_compiling() or not x.is_cpu:
        return False
    count = x.numel()
    library = native.loaded() or (native.load() if count >= WORTH_LOADING else None)
    name, extra = observer.kernel
    if library is None or not name or count == 0 or not observer._buffers["counts"].is_cpu:
        return False
    limit = sentinel_of(x.dtype)
    values = x if x.is_contiguous() else _dense(x)
    if values.dtype is not torch.float32:
        values = values.detach().to(torch.float32)
    buffers = [observer._buffers[part].data_ptr() for part in observer.statistics]
    threads = torch.get_num_threads()
    failed = getattr(library, name)(values.data_ptr(), count, limit, threads, *buffers, *extra)
    return not failed


def _dense(x: Tensor) -> Tensor:
    """The values of ``x`` in any order, without a copy where memory holds each of them once."""
    order = sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)
    return x.detach().permute(order).contiguous()
