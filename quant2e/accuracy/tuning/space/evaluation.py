"""Evaluation: calls the user's function on a model, and reads what it returns as a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.errors import Quant2eError
from quant2e.graph.mutation import own_tensors
from quant2e.isolation import IsolatedRandomness

Evaluate = Callable[[Any], Any]
"""A function of a model, called like the float one, that returns its metric: a number, or a tensor or array of one."""

_LONGEST_TEXT = 40
"""Characters of a text that is quoted where it stands for a number."""


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
            f"evaluate fails on the float model, before anything is quantized: {told(error)}. It is called with a "
            "model that takes what the captured one takes, and returns the metric as a number"
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


def no_metric(metric: float, *, higher_is_better: bool) -> str:
    """Why what was returned for a quantized model is no metric; empty where it is one.

    Infinity where it is worse than any number is the metric of a model that collapsed; where it is better than any,
    something went wrong in measuring it.
    """
    if math.isnan(metric):
        return "evaluate returned NaN"
    if math.isinf(metric) and (metric > 0) is higher_is_better:
        return f"evaluate returned {metric}, which is better than any number"
    return ""


def told(error: Exception) -> str:
    """What a function of the user's failed with, on one line: our own words as they are, others with their kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, Quant2eError) else f"{type(error).__name__}: {text or 'no message'}"


def _number(found: Any) -> float:
    """A number of any kind, or the element of a tensor or an array that has one."""
    count = found.numel() if isinstance(found, Tensor) else getattr(found, "size", 1)
    if count == 1 and callable(getattr(found, "item", None)):
        found = found.item()  # tensors, arrays and their numbers, series
    if isinstance(found, str | bytes) or count != 1 or not hasattr(type(found), "__float__"):
        raise Quant2eError(f"evaluate returned {_described(found)}: return one number, the metric")
    return float(found)


def _described(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of shape {list(found.shape)}"
    if isinstance(found, Mapping):
        return f"a {type(found).__name__} of {', '.join(map(repr, list(found)[:4])) or 'nothing'}"
    if found is None or isinstance(found, str | bytes):
        return "nothing" if found is None else f"a text, {found[:_LONGEST_TEXT]!r}"
    return f"a {type(found).__name__}"
