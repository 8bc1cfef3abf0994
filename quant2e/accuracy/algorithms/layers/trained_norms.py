"""Trained norms: batch norms of a graph that is trained with quantization get the statistics of its quantized ops.

mean, variance ← those of what each norm reads, over the data, with fake quantization on
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.graph.attributes import attribute
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.norm_forms import set_form
from quant2e.graph.constants import evaluate
from quant2e.graph.dataflow import operand, set_operand
from quant2e.isolation import IsolatedRandomness
from quant2e.observers.base import inner_observer, is_observer_call
from quant2e.observers.fake_quant import FakeQuantizeBase
from quant2e.passes.train_batch_norm import FUSED, FusedNorm

_STATISTICS = ("running_mean", "running_var")


def reestimate_trained_norms(gm: GraphModule, calls: Sequence[Call]) -> list[str]:
    """Give the norms of ``gm``, the caller's own, new statistics, in place; a line for each.

    Each batch is normalised by its own statistics, and the norm keeps those of all batches together: the mean of the
    means, and the mean of the variances with the variance of the means. What rounds the weights follows: they are
    divided by the new deviation.
    """
    found = _measured(copy.deepcopy(gm), calls)
    nodes = {node.name: node for node in gm.graph.nodes}
    lines, done = [], set()
    for record in gm.meta[FUSED]:
        norm = nodes[record.norm]
        mean, variance = (attribute(gm, path) for path in _paths(norm))
        if _paths(norm) in done:
            continue
        done.add(_paths(norm))
        new_mean, new_variance = found[_paths(norm)]
        deviation = (variance + operand(norm, "eps")).sqrt()
        moved = float(((new_mean - mean).abs() / deviation).max())
        ratio = ((new_variance + operand(norm, "eps")).sqrt() / deviation).double()
        with torch.no_grad():
            mean.copy_(new_mean)
            variance.copy_(new_variance)
        _follow(gm, record, nodes, 1.0 / ratio)
        spread = f"deviations change by {float(ratio.min()):.3f} to {float(ratio.max()):.3f}"
        lines.append(f"'{record.norm}': means move by up to {moved:.1%} of the deviation, {spread}")
    return lines


def _paths(norm: Node) -> tuple[str, str]:
    mean, variance = (str(operand(norm, name).target) for name in _STATISTICS)
    return mean, variance


def _measured(scratch: GraphModule, calls: Sequence[Call]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Mean and variance of what each norm of ``scratch``, which is changed, reads, by the paths of its buffers."""
    scratch.eval()
    nodes = {node.name: node for node in scratch.graph.nodes}
    times: dict[tuple[str, str], int] = defaultdict(int)
    for record in scratch.meta[FUSED]:
        norm = nodes[record.norm]
        set_form(norm, True, nodes)
        set_operand(norm, "training", True)
        times[_paths(norm)] += 1
        set_operand(norm, "momentum", 1.0 / times[_paths(norm)])  # a norm that is called twice keeps the average
    for module in scratch.modules():
        if isinstance(enabled := getattr(module, "observer_enabled", None), Tensor):
            enabled.zero_()
    scratch.graph.lint()
    scratch.recompile()
    seen: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    kept = {paths: [attribute(scratch, path).detach().clone() for path in paths] for paths in times}
    randomness = IsolatedRandomness()
    for call in calls:
        args, kwargs = call.copied()
        with torch.no_grad(), randomness:
            scratch(*args, **kwargs)
            for paths, originals in kept.items():
                buffers = [attribute(scratch, path) for path in paths]
                seen[paths].append((buffers[0].double(), buffers[1].double()))
                for buffer, original in zip(buffers, originals, strict=True):
                    buffer.copy_(original)  # weights are divided by the deviation that they are deployed with
    return {paths: _together(batches) for paths, batches in seen.items()}


def _together(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    means, variances = (torch.stack(list(each)) for each in zip(*batches, strict=True))
    return means.mean(0), variances.mean(0) + (means - means.mean(0)).square().mean(0)


def _follow(gm: GraphModule, record: FusedNorm, nodes: dict[str, Node], factors: Tensor) -> None:
    """Let what rounds a weight keep its integers: its scales take the factors of the channels, or are measured anew."""
    scaled = nodes[record.scaled]
    for call in [user for user in scaled.users if is_observer_call(user)]:
        module: Any = gm.get_submodule(str(call.target))
        observer = inner_observer(module)
        with torch.no_grad():
            if isinstance(scale := getattr(module, "scale", None), torch.nn.Parameter):
                if scale.numel() == factors.numel():
                    scale.mul_(factors.to(scale.dtype).reshape(scale.shape))
            elif isinstance(module, FakeQuantizeBase) and callable(getattr(observer, "reset_min_max_vals", None)):
                enabled = module.observer_enabled.clone()
                observer.reset_min_max_vals()
                module.enable_observer()
                module(evaluate(gm, scaled))
                module.observer_enabled.copy_(enabled)
