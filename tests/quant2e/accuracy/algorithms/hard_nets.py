"""Hard nets: functions of well-behaved nets, with ranges of channels spread by norms and the weights behind them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Separable(nn.Module):
    """Expand, depthwise, project, each with a batch norm, and a residual: the block of MobileNet V2."""

    def __init__(self, channels: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        wide = 2 * channels
        self.expand, self.norm1 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.project, self.norm3 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.act1, self.act2 = act(), act()  # each called once: torchao's quantizers match modules

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.norm1(self.expand(x)))
        return x + self.norm3(self.project(self.act2(self.norm2(self.depthwise(y)))))


class Depthwise(nn.Module):
    """Two blocks between a stem and a head."""

    def __init__(self, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act()
        self.blocks, self.head = nn.Sequential(Separable(8, act), Separable(8, act)), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.act(self.norm(self.stem(x)))).mean((2, 3)))


def images(count: int = 5) -> list[torch.Tensor]:
    """Batches for `depthwise`."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(count)]


def depthwise(*, hard: bool, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """A depthwise net with the statistics of data; hard: channels of its blocks spread over three decades."""
    torch.manual_seed(0)
    net = Depthwise(act).train()
    with torch.no_grad():
        for batch in images(10):
            net(batch)
        for block in net.blocks if hard else ():
            for norm, behind in ((block.norm1, block.depthwise), (block.norm2, block.project)):
                spread = 10.0 ** torch.empty(norm.num_features).uniform_(-1.5, 1.5)
                norm.weight *= spread
                norm.bias *= spread
                behind.weight /= spread[:, None, None, None] if behind.groups > 1 else spread[:, None, None]
    return net.eval()


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two blocks and a head over the mean of tokens of 32 numbers, as a small ViT behind its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(12, 32), nn.Sequential(Block(32, 4), Block(32, 4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))).mean(1))


def tokens(count: int = 5) -> list[torch.Tensor]:
    """Batches for `transformer`."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 9, 12, generator=generator) for _ in range(count)]


def transformer(*, hard: bool) -> nn.Module:
    """A small pre-norm transformer; hard: three channels behind each norm are 30 to 1000 times larger."""
    torch.manual_seed(0)
    net = Transformer()
    with torch.no_grad():
        for block in net.blocks if hard else ():
            for norm, behind in ((block.norm1, block.qkv), (block.norm2, block.up)):
                for channel, factor in ((3, 30.0), (11, 300.0), (20, 1000.0)):
                    norm.weight[channel] *= factor
                    norm.bias[channel] *= factor
                    behind.weight[:, channel] /= factor
    return net.eval()


class PostBlock(nn.Module):
    """A post-norm transformer block, as BERT's."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = self.norm1(x + self.out(y.transpose(1, 2).reshape(b, t, d)))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


def post_norm(*, hard: bool) -> nn.Module:
    """A small post-norm transformer; hard: two channels of each block's result, and one of its sums, are far larger.

    Linears behind a norm have the inverse on their columns, and the next norm makes the channel of a sum small again:
    layers and residuals read the same tensor, so that nothing in front can take a factor.
    """
    torch.manual_seed(0)
    net = Transformer()
    net.blocks = nn.Sequential(PostBlock(32, 4), PostBlock(32, 4))
    with torch.no_grad():
        for block in net.blocks if hard else ():
            block.down.weight[7] *= 300.0
            block.norm2.weight[7] = 0.05
            for channel, factor in ((3, 20.0), (11, 60.0)):
                block.norm1.weight[channel] *= factor
                block.up.weight[:, channel] /= factor
    return net.eval()
