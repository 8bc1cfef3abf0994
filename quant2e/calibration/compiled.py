"""Compiled calibration: the observed graph as one program of ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.captured.module import copy_graph
from quant2e.graph.dataflow import operand, readers
from quant2e.graph.effects import is_view
from quant2e.isolation import tracing

aten = torch.ops.aten


def compiled_graph(prepared: GraphModule) -> Callable[..., Any]:
    """A callable that runs ``prepared`` and lets its observers see what they see there; the first call compiles.

    The weights of linear layers are packed where nothing but linear layers would change by it: MKL then gives the same
    sums sooner (a tenth to a quarter at 128 rows). Inductor packs weights by making them constants of the program, so
    the program is the weights' as they are now: ask for a new one when they have changed.

    Without packed weights, Inductor would run every convolution in channels_last. That is much faster for grouped
    ones, depthwise above all, and slower for the others (``python -m benchmarks.calibration --compiled``).
    """
    grouped = any((operand(node, "groups") or 1) != 1 for node in _convolutions(prepared))
    options: dict[str, Any] = {"layout_optimization": grouped}
    packed = _only_linears_are_packed(prepared)
    own = prepared
    if packed:
        # a graph of its own: torch keeps programs by the code they were made of, and would run one with the weights of
        # before
        own = copy_graph(prepared)
        own._modules = prepared._modules  # the observers themselves
    run = torch.compile(own, dynamic=False, options=options)

    def call(*args: Any, **kwargs: Any) -> Any:
        # the model draws from the caller's random streams
        with tracing(streams=False), constant_weights() if packed else nullcontext():
            return run(*args, **kwargs)

    return call


@contextmanager
def constant_weights() -> Iterator[None]:
    """``torch.compile`` makes weights constants of the programs that it compiles in here, and packs them.

    Inductor reads this setting while it traces: among the options of ``torch.compile`` it would come too late.
    """
    import torch._inductor.config

    with torch._inductor.config.patch(freezing=True):
        yield


def _convolutions(prepared: GraphModule) -> Iterator[Node]:
    return (node for node in prepared.graph.nodes if operand(node, "weight") and operand(node, "groups") is not None)


def _only_linears_are_packed(prepared: GraphModule) -> bool:
    """Whether there are linear layers, and no convolution that would be fused with what follows it.

    A fused ``relu`` can hide the NaN that its observer is to see, and between observers a packed convolution spends
    more on changing layouts than it gains.
    """
    linear = any(node.target is aten.linear.default for node in prepared.graph.nodes)
    found = (user for node in _convolutions(prepared) for user in readers(node, lambda user: user.op == "call_module"))
    return linear and all(is_view(user) for user in found if user.op == "call_function")
