"""Dispatch of observer updates to the native ops: when one op can do it, and the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant2e.observers.native import ops as native
from quant2e.ranges.histogram import Histogram
from quant2e.ranges.minmax import MinMax, MovingAverage, sentinel_of

WORTH_LOADING = 1 << 16
"""Tensors with fewer values do not cause the ops to be loaded; once they are, these use them as well."""

_LIMITS = {dtype: sentinel_of(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def kernel_of(estimator: Any) -> tuple[str, tuple[Any, ...]]:
    """Name of the native op for an estimator and its last arguments; an empty name when there is none."""
    if getattr(estimator, "axis", None) is not None or getattr(estimator, "group_size", None) is not None:
        return "", ()
    if type(estimator) is MinMax:
        return "observe_minmax", ()
    if type(estimator) is MovingAverage:
        return "observe_average", (estimator.averaging_constant,)
    if type(estimator) is Histogram and not estimator.skip_zeros:
        return "observe_histogram", ()
    return "", ()


def native_update(observer: Any, x: Tensor) -> bool:
    """Update the buffers of ``observer`` with ``x`` by a native op; False when that is not possible here."""
    ops = native._ready[0] if native._ready else _worth_loading(x)
    limit = _LIMITS.get(x.dtype)
    name, extra = observer.kernel
    if ops is None or limit is None or not name or type(x) is not Tensor or not x.is_cpu:
        return False
    buffers = observer._buffers
    state = [buffers[part] for part in observer.statistics]
    if not state[0].is_cpu or torch.compiler.is_exporting():
        return False
    if x.requires_grad:
        x = x.detach()
    ops[name](x if x.dtype is torch.float32 else x.to(torch.float32), limit, *state, *extra)
    return True


def _worth_loading(x: Tensor) -> Any:
    return native.load_ops() if x.numel() >= WORTH_LOADING and not torch.compiler.is_compiling() else None
