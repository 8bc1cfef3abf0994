"""Distributed calibration: an exact all-reduce of the statistics of many processes.

Every rank runs its own batches. At the end, for all observers of the model at once:

1. smallest minimum, largest maximum: one all-reduce each of one float per range;
2. each rank widens its histograms to the bins of the common range, which follow from it alone;
3. sum of all bins and counters: one all-reduce of one int64 per bin.

Four all-reduces in all, with one more for errors, whatever the number of layers. Integers add up in any order, so the
result is that of one process bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule

from quant2e.calibration.statistics import fingerprint, measuring, observers_of, put
from quant2e.errors import CalibrationError
from quant2e.observers.data_parallel import is_distributed
from quant2e.observers.measuring import UniformQuantizationObserverBase
from quant2e.ranges.histogram import widen, windows
from quant2e.ranges.minmax import MovingAverage

_FINGERPRINT_BITS = 62


def world() -> int:
    """How many processes calibrate together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if is_distributed() else 1


def check_mergeable(prepared: GraphModule) -> None:
    """Raise `CalibrationError` when an observer's statistics depend on the order of the data, or are not ours."""
    ours = measuring(prepared)
    for name, observer in observers_of(prepared).items():
        if name in ours and isinstance(ours[name].estimator, MovingAverage) and not ours[name].frozen:
            raise CalibrationError(
                f"{name} is a moving average, which depends on the order of the batches and cannot be merged; "
                "calibrate in one process, or use MinMaxObserver or HistogramObserver"
            )
        foreign = name not in ours and isinstance(getattr(observer, "min_val", None), Tensor)
        if foreign:
            raise CalibrationError(
                f"{name} is a {type(observer).__module__}.{type(observer).__name__}: how its statistics are merged is "
                "not known; calibrate in one process, or use an observer of quant2e"
            )


def all_well(error: BaseException | None, batches: int, prepared: GraphModule) -> int:
    """Agree whether every rank got here without error, with the same model; returns the number of all batches.

    Raises `CalibrationError` on every rank when one failed, so that none waits for it in vain.
    """
    digest = _digest(fingerprint(prepared))
    mine = torch.tensor([int(error is not None), digest, -digest], device=_device())
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    count = torch.tensor([batches], device=mine.device)
    dist.all_reduce(count, op=dist.ReduceOp.SUM)
    if error is not None:
        raise error
    failed, largest, smallest = (int(value) for value in mine)
    if failed:
        raise CalibrationError("calibration failed on another rank, so nothing was merged; see the message there")
    if largest != -smallest:
        raise CalibrationError(
            "the ranks calibrate different models: prepare the same model with the same quantizer on every rank"
        )
    return int(count)


def _digest(text: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - _FINGERPRINT_BITS)


def _device() -> torch.device:
    """Where the backend's tensors must be: NCCL knows GPUs only, gloo takes the host's."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@torch.no_grad()
def reduce_statistics(prepared: GraphModule) -> None:
    """Give every rank the statistics of all, in place. Observers of weights, equal on all ranks, are left out."""
    observers = [observer for observer in measuring(prepared).values() if not observer.frozen]
    if not observers:
        return
    device = _device()
    _agree_on_shapes(observers, device)
    low, high = _joined(observers, "min_val", device), _joined(observers, "max_val", device)
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    sizes = [observer.min_val.numel() for observer in observers]
    lows, highs = low.split(sizes), high.split(sizes)
    sums = [_summands(*parts) for parts in zip(observers, lows, highs, strict=True)]
    flat = torch.cat([part.reshape(-1).to(device) for parts in sums for part in parts])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    pieces = iter(flat.split([part.numel() for parts in sums for part in parts]))
    for observer, least, most in zip(observers, lows, highs, strict=True):
        shape = observer.min_val.shape
        state = {"min_val": least.reshape(shape), "max_val": most.reshape(shape), "counts": next(pieces)}
        if "histogram" in observer.statistics:
            state["histogram"] = next(pieces).reshape(observer.get_buffer("histogram").shape)
        put(observer, state)


def _agree_on_shapes(observers: Sequence[UniformQuantizationObserverBase[Any]], device: torch.device) -> None:
    """Per-channel observers of a rank without data learn how many channels there are from the others."""
    rank = max(observer.min_val.dim() for observer in observers)
    if rank == 0:
        return
    shapes = torch.tensor(
        [[*observer.min_val.shape, *[0] * (rank + 1 - observer.min_val.dim())] for observer in observers], device=device
    )
    dims = torch.tensor([observer.min_val.dim() for observer in observers], device=device).unsqueeze(1)
    largest, smallest = torch.cat([shapes, dims], 1), torch.cat([shapes, dims], 1)
    empty = torch.tensor([observer.min_val.numel() == 0 for observer in observers], device=device)
    smallest[empty] = torch.iinfo(torch.int64).max
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    for observer, most, least in zip(observers, largest.tolist(), smallest.tolist(), strict=True):
        shape = tuple(most[: most[-1]])
        seen = 0 not in shape
        if seen and most != least:
            raise CalibrationError(
                f"ranks saw channels of different number, up to {shape}; the channel axis must have a constant size"
            )
        if seen and observer.min_val.numel() == 0:
            none = torch.full(shape, float("inf"))
            state = {"min_val": none, "max_val": -none}
            if "histogram" in observer.statistics:
                bins = observer.get_buffer("histogram").shape[-1]
                state["histogram"] = torch.zeros((*shape, bins), dtype=torch.int64)
            put(observer, state)


def _joined(observers: Sequence[UniformQuantizationObserverBase[Any]], part: str, device: torch.device) -> Tensor:
    return torch.cat([observer.get_buffer(part).reshape(-1).to(device) for observer in observers])


def _summands(observer: UniformQuantizationObserverBase[Any], low: Tensor, high: Tensor) -> list[Tensor]:
    """What adds up over ranks: the counters, and the bins once they are those of the common range."""
    if "histogram" not in observer.statistics:
        return [observer.counts]
    histogram = observer.get_buffer("histogram")
    bins = histogram.shape[-1]
    own = windows(observer.min_val.reshape(-1), observer.max_val.reshape(-1), bins)
    common = windows(low.to(histogram.device), high.to(histogram.device), bins)
    widened = widen(histogram.reshape(-1, bins), own, common)
    return [observer.counts, widened]
