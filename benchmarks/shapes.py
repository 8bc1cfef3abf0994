"""Networks with the shapes of well-known ones and random weights: for measuring time and memory, not accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


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


class _Hidden(nn.Module):
    """A transformer's last hidden state, as a tensor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.inner(input_ids=ids).last_hidden_state
        return hidden


def bert_base() -> nn.Module:
    """Devlin et al., "BERT", arXiv:1810.04805: 12 layers, 768 wide; transformers' implementation."""
    from transformers import BertConfig, BertModel

    config = BertConfig()
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
    "BERT-base": (bert_base, tokens),
}
"""By name: the model, and its input for a batch size."""


def linears(layers: int, width: int = 16) -> nn.Module:
    """A chain of so many linears with relu between them."""
    return nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]).eval()
