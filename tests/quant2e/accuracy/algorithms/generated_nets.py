"""Nets drawn at random from the layers and joints through which factors of channels move, or must not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import nn


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Joined(nn.Module):
    """f(x) and g(x) one behind the other."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.other(x)], 1)


class Gate(nn.Module):
    """x · sigmoid(f(mean x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.scale(x.mean((2, 3), keepdim=True)))


class Affine(nn.Module):
    """x · a + b for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)
        self.b = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.a + self.b


class Shuffled(nn.Module):
    """Channels in two halves that change places, through a view."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Half(nn.Module):
    """Half of the channels through a layer, the others as they are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels // 2, channels // 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = x.chunk(2, 1)
        return torch.cat([self.layer(one), other], 1)


class Rows(nn.Module):
    """Channels last through linears and norms, and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=channels % 8 == 0)
        self.up, self.down = nn.Linear(channels, 12), nn.Linear(12, channels)
        self.act = nn.PReLU(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.norm(x.permute(0, 2, 3, 1)))
        return self.down(self.act(y.flatten(1, 2).transpose(1, 2)).transpose(1, 2)).mean(1)[:, :, None, None] + x


class Attention(nn.Module):
    """Two heads of attention over places, one projection for all three operands."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        rows = self.qkv(self.norm(x.flatten(2).transpose(1, 2)))
        q, k, v = rows.reshape(n, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) * 0.3, -1)
        y = self.out((weights @ v).transpose(1, 2).reshape(n, h * w, c))
        return x + y.transpose(1, 2).reshape(n, c, h, w)


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x)))


class Net(nn.Module):
    """A stem, drawn blocks of eight channels and a head."""

    def __init__(self, blocks: list[nn.Module], pooled: bool) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(*blocks)
        self.pooled = pooled
        self.head = nn.Linear(8 if pooled else 8 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks(self.stem(x))
        return self.head(y.mean((2, 3)) if self.pooled else nn.functional.adaptive_avg_pool2d(y, 4).flatten(1))


C = 8
BLOCKS: list[Callable[[], nn.Module]] = [
    lambda: nn.Conv2d(C, C, 3, padding=1),
    lambda: nn.Conv2d(C, C, 3, padding=1, groups=C, bias=False),
    lambda: nn.Conv2d(C, C, 1, groups=2),
    lambda: nn.ConvTranspose2d(C, C, 3, padding=1, groups=4),
    lambda: nn.ConvTranspose2d(C, C, 1),
    lambda: nn.BatchNorm2d(C),
    lambda: nn.BatchNorm2d(C, affine=False),
    lambda: nn.GroupNorm(2, C),
    lambda: nn.InstanceNorm2d(C, affine=True),
    lambda: nn.ReLU(inplace=True),
    lambda: nn.ReLU6(inplace=True),
    lambda: nn.Hardtanh(-0.5, 0.7),
    lambda: nn.LeakyReLU(0.1),
    lambda: nn.PReLU(C),
    nn.SiLU,
    lambda: nn.MaxPool2d(3, 1, 1),
    lambda: nn.AvgPool2d(3, 1, 1),
    lambda: nn.Dropout(0.5),
    lambda: nn.Upsample(scale_factor=2.0),
    lambda: nn.ZeroPad2d(1),
    lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU6()),
    lambda: nn.Sequential(nn.Conv2d(C, C, 3, padding=1, groups=C), nn.BatchNorm2d(C), nn.ReLU()),
    lambda: Residual(nn.Conv2d(C, C, 1)),
    lambda: Residual(nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU(), nn.Conv2d(C, C, 1))),
    lambda: Joined(nn.Conv2d(C, 4, 1), nn.Sequential(nn.Conv2d(C, 4, 1), nn.ReLU())),
    lambda: Gate(C),
    lambda: Affine(C),
    Shuffled,
    lambda: Half(C),
    lambda: Rows(C),
    lambda: Attention(C),
    lambda: Twice(C),
]


@st.composite
def nets(draw: st.DrawFn) -> nn.Module:
    """A net in evaluation mode, with random weights and statistics; called with (n, 3, h, w), n of any size."""
    chosen = draw(st.lists(st.sampled_from(range(len(BLOCKS))), min_size=2, max_size=8))
    pooled, seed = draw(st.booleans()), draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    net = Net([BLOCKS[index]() for index in chosen], pooled)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1.0, 1.0)
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d) and module.weight is not None:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net.eval()
