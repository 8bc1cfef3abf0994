"""Hard versions: the same function, with the ranges of channels spread over three decades.

Where a norm is followed by layers that are linear in each channel (with a relu between, or none),

    norm'(x)_c = 2^k_c · norm(x)_c        weight'[:, c] = 2^-k_c · weight[:, c]

is the same function, for any k, and with powers of two bit for bit. Float does not move; one scale for all channels of
the activation between, or for all inputs of a weight, cannot hold them any more.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.accuracy.nets import Block, CharacterModel, DepthwiseNet, DigitsViT, InvertedResidual

OCTAVES = 10
"""Between the smallest and the largest channel: 2^10, three decades."""

Norm = nn.BatchNorm2d | nn.LayerNorm
Linear = nn.Conv2d | nn.Linear


def _rescale(norm: Norm, behind: Sequence[Linear], exponents: Tensor) -> None:
    factor = torch.exp2(exponents.float())
    norm.weight.mul_(factor)
    norm.bias.mul_(factor)
    for layer in behind:
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
        shape = (-1, 1, 1, 1) if depthwise else (1, -1) + (1,) * (layer.weight.dim() - 2)
        layer.weight.div_(factor.view(shape))


def _norms_and_what_is_behind(model: nn.Module) -> list[tuple[Norm, list[Linear]]]:
    """Each norm whose result only some linear layers read, with those layers."""
    found: list[tuple[Norm, list[Linear]]] = []
    for module in model.modules():
        if isinstance(module, InvertedResidual):
            _, norm1, _, depthwise, norm2, _, narrow, _ = module.body
            assert isinstance(norm1, nn.BatchNorm2d) and isinstance(norm2, nn.BatchNorm2d)  # noqa: PT018
            assert isinstance(depthwise, nn.Conv2d) and isinstance(narrow, nn.Conv2d)  # noqa: PT018
            found += [(norm1, [depthwise]), (norm2, [narrow])]
        elif isinstance(module, Block):
            attention = module.attention
            found += [(module.norm1, [attention.query, attention.key, attention.value]), (module.norm2, [module.up])]
        elif isinstance(module, DigitsViT):
            found.append((module.norm, [module.classifier]))
        elif isinstance(module, CharacterModel):
            found.append((module.norm, [module.head]))
    return found


def spread(model: nn.Module, *, outliers: int | None = None, seed: int = 0) -> nn.Module:
    """A copy of a `DepthwiseNet`, `DigitsViT` or `CharacterModel` with other ranges and the same outputs.

    All channels are spread evenly, in octaves, over three decades; with ``outliers``, so many channels of each norm are
    128 to 1,024 times as large as before, and the others stay.
    """
    assert isinstance(model, DepthwiseNet | DigitsViT | CharacterModel)
    hard = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm, behind in _norms_and_what_is_behind(hard):
            channels = len(norm.weight)
            if outliers is None:
                exponents = torch.randint(-OCTAVES // 2, OCTAVES // 2 + 1, (channels,), generator=generator)
            else:
                exponents = torch.zeros(channels, dtype=torch.int64)
                chosen = torch.randperm(channels, generator=generator)[:outliers]
                exponents[chosen] = torch.randint(7, OCTAVES + 1, (outliers,), generator=generator)
            _rescale(norm, behind, exponents)
    return hard
