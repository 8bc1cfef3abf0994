"""Observation in data-parallel training: one batch is what all processes of DistributedDataParallel see of it.

Statistics are those that one process would find in the whole batch, bit for bit: each process looks at its part, the
parts are gathered, one vector per observer and step, and every process takes the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quant2e.observers.uniform import UniformQuantizationObserverBase
from quant2e.ranges.minmax import MinMax, MovingAverage
from quant2e.ranges.sentinels import hide_sentinels


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()


def _training_group() -> dist.ProcessGroup | None:
    """The processes that run this forward together; None outside of DistributedDataParallel, and for one alone."""
    running = torch.nn.parallel.DistributedDataParallel._active_ddp_module
    group = getattr(running, "process_group", None)
    return None if group is None or dist.get_world_size(group) == 1 else group


@torch.no_grad()
def _observe_together(observer: UniformQuantizationObserverBase[Any], x: Tensor, group: dist.ProcessGroup) -> None:
    """Update the statistics of ``observer`` with ``x`` of every process of ``group``, all of which call this."""
    if observer.frozen:
        return
    if x.device != observer.counts.device:
        observer.to(x.device)
    estimator = observer.estimator
    data = x if observer.never is None else hide_sentinels(x, observer.never)
    own = estimator.update(estimator.init(data), data)
    gathered = [type(own)(**parts) for parts in _gather(_parts(own, x, estimator), group)]
    if isinstance(estimator, MovingAverage):
        batch = reduce(MinMax(estimator.axis, estimator.group_size).merge, gathered)
        observer._store(estimator.follow(observer.state, batch))
    else:
        observer._store(reduce(estimator.merge, gathered, observer.state))


# What a compiled step must not trace: torch's own optimizers are marked in the same way.
training_group: Callable[[], dist.ProcessGroup | None] = torch._disable_dynamo(_training_group)
observe_together: Callable[[UniformQuantizationObserverBase[Any], Tensor, dist.ProcessGroup], None]
observe_together = torch._disable_dynamo(_observe_together)


def _parts(state: Any, x: Tensor, estimator: Any) -> dict[str, Tensor]:
    """The tensors of a state by name; of a process without data as many channels as the others have."""
    parts = {field.name: getattr(state, field.name) for field in fields(state)}
    axis = getattr(estimator, "axis", None)
    if x.numel() == 0 and axis is not None:
        for name, value in parts.items():
            if name != "counts":
                fill = {"min_val": float("inf"), "max_val": float("-inf")}.get(name, 0)
                parts[name] = value.new_full((x.shape[axis], *value.shape[1:]), fill)
    return parts


def _gather(parts: dict[str, Tensor], group: dist.ProcessGroup) -> list[dict[str, Tensor]]:
    """The tensors of every process, in one exchange; float64 holds every float32 and every count exactly."""
    mine = torch.cat([part.reshape(-1).to(torch.float64) for part in parts.values()])
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    sizes = [part.numel() for part in parts.values()]
    return [
        {
            name: piece.reshape(part.shape).to(part.dtype)
            for piece, (name, part) in zip(row.split(sizes), parts.items(), strict=True)
        }
        for row in rows
    ]
