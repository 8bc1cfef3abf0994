"""Channel ranges: the largest absolute value of each factor's channels, in weights and activations, and the mean."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.channels.scaling import ChannelScaling
from quant2e.accuracy.algorithms.channels.walk import Strength
from quant2e.accuracy.shadow import FloatValues
from quant2e.graph.captured.calls import Call


def largest(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """The largest of ``values`` (not negative) that have each label, ``(count,)`` float64; 0 for labels without any."""
    rank = max(values.dim(), labels.dim())
    wide = values.reshape((1,) * (rank - values.dim()) + tuple(values.shape))
    labels = labels.reshape((1,) * (rank - labels.dim()) + tuple(labels.shape))
    axes = [axis for axis in range(rank) if labels.size(axis) == 1 and wide.size(axis) > 1]
    least = wide.amax(axes, keepdim=True) if axes and wide.numel() else wide
    least, labels = torch.broadcast_tensors(least.double().cpu(), labels)
    return torch.zeros(count, dtype=torch.float64).scatter_reduce_(0, labels.flatten(), least.flatten(), "amax")


def scaled(strength: Strength, factors: Tensor) -> Tensor:
    """The strength of an op with factors put in."""
    size = strength.size.double().cpu() * factors[strength.makes]
    return size if strength.reads is None or not strength.is_matrix else size / factors[strength.reads]


def activation_ranges(gm: GraphModule, scaling: ChannelScaling, calls: Iterable[Call]) -> dict[str, Tensor]:
    """The largest absolute value of each factor's channels in the tensors that are read, by their names, over data.

    ``(scaling.count,)`` float64 each; without data none.
    """
    values = FloatValues(gm, frozenset(scaling.tensors))
    found: dict[str, Tensor] = {}
    for call in calls:
        for name, tensor in values.of(call).items():
            seen = largest(tensor.abs(), scaling.tensors[name], scaling.count)
            found[name] = torch.maximum(found[name], seen) if name in found else seen
    return found


def activation_means(gm: GraphModule, scaling: ChannelScaling, calls: Iterable[Call]) -> dict[str, Tensor]:
    """The mean absolute value of each factor's channels in the tensors that are read, by their names, over data.

    ``(scaling.count,)`` float64 each, 0 for channels that a tensor does not have; without data none.
    """
    values = FloatValues(gm, frozenset(scaling.tensors))
    sums: dict[str, Tensor] = {}
    for call in calls:
        for name, tensor in values.of(call).items():
            found, labels = torch.broadcast_tensors(*_narrowed(tensor.abs(), scaling.tensors[name]))
            both = torch.stack([found.flatten(), torch.ones(found.numel(), dtype=torch.float64)])
            known = sums.setdefault(name, torch.zeros(2, scaling.count, dtype=torch.float64))
            known.index_add_(1, labels.flatten(), both)
    return {name: total / count.clamp(min=1.0) for name, (total, count) in sums.items()}


def _narrowed(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Means along the axes along which labels do not change."""
    axes = [axis for axis in range(values.dim()) if labels.size(axis) == 1 and values.size(axis) > 1]
    return (values.double().mean(axes, keepdim=True) if axes else values.double()).cpu(), labels
