"""Networks that are trained here: a depthwise-separable CNN, a vision transformer, a language model of characters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """Widen by 1×1, depthwise 3×3, narrow by 1×1, with batch norm and relu; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, expand: int = 4) -> None:
        super().__init__()
        wide = inputs * expand
        self.body = nn.Sequential(
            *_conv(inputs, wide, 1),
            nn.ReLU(),
            *_conv(wide, wide, 3, stride=stride, groups=wide),
            nn.ReLU(),
            *_conv(wide, outputs, 1),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        return self.body(x) + x if self.shortcut else self.body(x)


class DepthwiseNet(nn.Module):
    """8×8 grey images to ten logits: a stem, four inverted residual blocks, average pooling, one linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv(1, width, 3),
            nn.ReLU(),
            InvertedResidual(width, width),
            InvertedResidual(width, 2 * width, stride=2),
            InvertedResidual(2 * width, 2 * width),
            InvertedResidual(2 * width, 2 * width),
        )
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """[n, 1, 8, 8] to logits [n, 10]."""
        x = F.adaptive_avg_pool2d(self.features(images), 1)
        return self.classifier(torch.flatten(x, 1))


class Attention(nn.Module):
    """Scaled dot-product attention over several heads, spelled out: two products and a softmax (Vaswani et al. 2017).

    ``causal``: a position sees itself and what is before it, up to ``length`` positions.
    """

    bias: Tensor

    def __init__(self, width: int, heads: int, length: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        hidden = torch.full((length, length), -1e4).triu(1) if causal else torch.zeros(length, length)
        self.register_buffer("bias", hidden)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """[n, length, width] to the same shape."""
        shape = (*x.shape[:2], self.heads, self.head_width)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-2, -1) * self.head_width**-0.5
        if self.causal:
            scores = scores + self.bias
        mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """A transformer's layer with its norms in front: attention, then two linears around gelu, four times as wide."""

    def __init__(self, width: int, heads: int, length: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, length, causal=causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, length, width] to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class DigitsViT(nn.Module):
    """8×8 grey images to ten logits: 16 patches of 2×2, three layers, their mean (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(Block(width, heads, 16, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """[n, 1, 8, 8] to logits [n, 10]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x).mean(1))


class CharacterModel(nn.Module):
    """Characters to logits of the next one, at each position: a decoder of two layers with learned positions."""

    def __init__(self, characters: int, width: int = 128, heads: int = 4, depth: int = 2, length: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.blocks = nn.ModuleList(Block(width, heads, length, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, characters: Tensor) -> Tensor:
        """int64 [n, length] to logits [n, length, characters]."""
        x = self.embedding(characters) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
