"""Evaluation: calls the user's function on a model, and reads what it returns as a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.errors import Quant2eError
from quant2e.graph.mutation import own_tensors
from quant2e.isolation import IsolatedRandomness

Evaluate = Callable[[Any], Any]
"""A function of a model, called like the float one, that returns its metric: a number, or a tensor or array of one."""


def metric_of(evaluate: Evaluate, module: GraphModule) -> float:
    """What ``evaluate`` returns for a model, without gradients.

    ``module`` is given tensors of its own first, in place: a function that casts it, or writes to its weights, changes
    no other model. Each call draws the same random numbers, and the caller's streams are as they were. Raises what the
    function raises, and `Quant2eError` for what is no real number.
    """
    own_tensors(module)
    with torch.no_grad(), IsolatedRandomness():
        found = evaluate(module)
    return _number(found)


def float_metric_of(evaluate: Evaluate, module: GraphModule) -> float:
    """The metric of the float model. Raises `Quant2eError` where there is none: nothing could be compared with it."""
    try:
        metric = metric_of(evaluate, module)
    except Exception as error:
        raise Quant2eError(
            f"evaluate fails on the float model, before anything is quantized: {type(error).__name__}: {error}. It is "
            "called with a model that takes what the captured one takes, and returns the metric as a number"
        ) from error
    if not math.isfinite(metric):
        raise Quant2eError(f"evaluate returns {metric} for the float model, so no drop can be measured against it")
    return metric


def latency_of(latency: Callable[[Any], Any], model: Any) -> float:
    """Seconds, as ``latency`` returns them for a model. Raises what it raises, and `Quant2eError` for no number."""
    found = latency(model)
    try:
        seconds = float(found)
    except (TypeError, ValueError, RuntimeError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0.0):
        raise Quant2eError(f"latency returned {found!r}: return seconds of one call, a number")
    return seconds


def _number(found: Any) -> float:
    """A number, or the element of a tensor or an array that has one."""
    if isinstance(found, Tensor):
        if found.numel() == 1 and not found.is_complex():
            return float(found.detach().item())
        raise Quant2eError(f"evaluate returned a tensor of shape {list(found.shape)}: return one number, the metric")
    if isinstance(found, int | float):
        return float(found)
    if getattr(found, "size", None) == 1 and callable(getattr(found, "item", None)):
        found = found.item()
        if isinstance(found, int | float):
            return float(found)
    raise Quant2eError(f"evaluate returned a {type(found).__name__}: return one number, the metric")
