"""Networks with the shapes of well-known ones and random weights: for measuring time and memory, not accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

F = nn.functional


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution and batch norm."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """``relu(body(x) + shortcut(x))``, or without relu."""

    def __init__(self, body: list[nn.Module], shortcut: list[nn.Module], activate: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential(*shortcut)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) + self.shortcut(x)
        return torch.relu(y) if self.activate else y


def resnet18() -> nn.Module:
    """He et al., "Deep Residual Learning", arXiv:1512.03385, table 1, 18 layers."""
    layers: list[nn.Module] = [*conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for stage in range(4):
        for block in range(2):
            out, stride = 64 << stage, 2 if stage and not block else 1
            body = [*conv(width, out, 3, stride), nn.ReLU(), *conv(out, out, 3)]
            layers.append(Residual(body, conv(width, out, 1, stride) if stride > 1 or width != out else [], True))
            width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)).eval()


def mobilenet_v2() -> nn.Module:
    """Sandler et al., "MobileNetV2", arXiv:1801.04381, table 2."""
    layers: list[nn.Module] = [*conv(3, 32, 3, 2), nn.ReLU6()]
    width = 32
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, out, repeats, first_stride in table:
        for block in range(repeats):
            stride, wide = first_stride if block == 0 else 1, width * expansion
            body: list[nn.Module] = [*conv(width, wide, 1), nn.ReLU6()] if expansion > 1 else []
            body += [*conv(wide, wide, 3, stride, wide), nn.ReLU6(), *conv(wide, out, 1)]
            plain = stride > 1 or width != out
            layers.append(nn.Sequential(*body) if plain else Residual(body, [], False))
            width = out
    layers += [*conv(width, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers).eval()


class _Gate(nn.Module):
    """Squeeze and excitation: each channel times a gate computed from the means of all channels."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(x, 1)
        return x * F.hardsigmoid(self.up(F.relu(self.down(means))))


def _multiple_of_8(width: float) -> int:
    """Nearest multiple of 8, not below 90 % of ``width``."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * width else rounded + 8


def mobilenet_v3() -> nn.Module:
    """Howard et al., "Searching for MobileNetV3", arXiv:1905.02244, table 1 (Large)."""
    layers: list[nn.Module] = [*conv(3, 16, 3, 2), nn.Hardswish()]
    width = 16
    relu, swish = nn.ReLU, nn.Hardswish
    # kernel, expanded width, width, gate, activation, stride
    table: list[tuple[int, int, int, bool, type[nn.Module], int]] = [
        (3, 16, 16, False, relu, 1),
        (3, 64, 24, False, relu, 2),
        (3, 72, 24, False, relu, 1),
        (5, 72, 40, True, relu, 2),
        *[(5, 120, 40, True, relu, 1)] * 2,
        (3, 240, 80, False, swish, 2),
        (3, 200, 80, False, swish, 1),
        *[(3, 184, 80, False, swish, 1)] * 2,
        (3, 480, 112, True, swish, 1),
        (3, 672, 112, True, swish, 1),
        (5, 672, 160, True, swish, 2),
        *[(5, 960, 160, True, swish, 1)] * 2,
    ]
    for kernel, wide, out, gated, activation, stride in table:
        body: list[nn.Module] = [*conv(width, wide, 1), activation()] if wide != width else []
        body += [*conv(wide, wide, kernel, stride, wide), activation()]
        body += [_Gate(wide, _multiple_of_8(wide / 4))] if gated else []
        body += conv(wide, out, 1)
        plain = stride > 1 or width != out
        layers.append(nn.Sequential(*body) if plain else Residual(body, [], False))
        width = out
    layers += [*conv(width, 960, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers += [nn.Linear(960, 1280), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers).eval()


class _Encoder(nn.Module):
    """A transformer block with the normalization in front, as in the vision transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.second(x))


class _VisionTransformer(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, patch: int, image: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*[_Encoder(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit(layers: int = 12, width: int = 768, heads: int = 12, patch: int = 16, image: int = 224) -> nn.Module:
    """Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929, table 1 (Base)."""
    return _VisionTransformer(layers, width, heads, patch, image).eval()


class _Hidden(nn.Module):
    """A transformer's last hidden state, as a tensor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.inner(input_ids=ids).last_hidden_state
        return hidden


def bert_base(layers: int = 12) -> nn.Module:
    """Devlin et al., "BERT", arXiv:1810.04805: 12 layers, 768 wide; transformers' implementation."""
    from transformers import BertConfig, BertModel

    config = BertConfig(num_hidden_layers=layers)
    config._attn_implementation = "eager"
    return _Hidden(BertModel(config, add_pooling_layer=False)).eval()


def images(batch: int) -> tuple[Tensor, ...]:
    """A batch of images of 224 x 224."""
    return (torch.randn(batch, 3, 224, 224),)


def tokens(batch: int) -> tuple[Tensor, ...]:
    """A batch of 128 tokens."""
    return (torch.randint(0, 30_000, (batch, 128)),)


SHAPES: Mapping[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "ResNet-18": (resnet18, images),
    "MobileNetV2": (mobilenet_v2, images),
    "MobileNetV3": (mobilenet_v3, images),
    "ViT-B/16": (vit, images),
    "BERT-base": (bert_base, tokens),
}
"""By name: the model, and its input for a batch size."""


def linears(layers: int, width: int = 16) -> nn.Module:
    """A chain of so many linears with relu between them."""
    return nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]).eval()
