"""Convolutional, recurrent and audio networks in plain torch.nn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import Architecture, Extent, image, integers, normal, of_batch, stack


def block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, relu."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return stack([layer, nn.BatchNorm2d(outputs), nn.ReLU()])


class UNet(nn.Module):
    """Ronneberger et al., arXiv:1505.04597, with two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.bottom = block(3, 8), block(8, 16), block(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.join2, self.join1, self.head = block(32, 16), block(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        b = self.deep(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        b = self.join2(torch.cat([b, self.up2(c)], 1))
        return self.head(self.join1(torch.cat([a, self.up1(b)], 1)))


class DiffusionUNet(nn.Module):
    """A step of denoising: group norms, silu, attention at the bottom, and the time added to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.time = stack([nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)])
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(4, 16), nn.GroupNorm(4, 16)
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.down, self.up = nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(8, device=t.device) / 2.0)
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        x = self.first(x)
        h = self.conv1(F.silu(self.norm1(x))) + time[:, :, None, None]
        h = self.down(x + self.conv2(F.silu(self.norm2(h))))
        tokens = h.flatten(2).transpose(1, 2)
        h = h + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).view_as(h)
        return self.last(self.up(F.interpolate(h, scale_factor=2.0, mode="nearest")) + x)


class Dense(nn.Module):
    """Huang et al., arXiv:1608.06993: each layer reads all those in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = block(3, 8)
        self.layers = nn.ModuleList(
            stack([nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1)]) for i in range(3)
        )
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.first(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(F.adaptive_avg_pool2d(torch.cat(features, 1), 1).flatten(1))


class Inception(nn.Module):
    """Szegedy et al., arXiv:1409.4842: branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16, stride=2)
        self.one, self.three, self.five = block(16, 8, 1), block(16, 8), stack([block(16, 4, 1), block(4, 8, 5)])
        self.pool, self.head = block(16, 8, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branches = [self.one(x), self.three(x), self.five(x), self.pool(F.max_pool2d(x, 3, 1, 1))]
        return self.head(torch.cat(branches, 1).mean((2, 3)))


class Shuffle(nn.Module):
    """Ma et al., arXiv:1807.11164: half of the channels pass, then all are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16, stride=2)
        branch = [block(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), block(8, 8, 1)]
        self.branch, self.shuffle, self.head = stack(branch), nn.ChannelShuffle(2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        return self.head(self.shuffle(torch.cat([a, self.branch(b)], 1)).mean((2, 3)))


class Squeeze(nn.Module):
    """Squeeze and excitation with hardswish, as in MobileNetV3 (arXiv:1905.02244)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = stack([nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish()])
        self.depthwise = stack([nn.Conv2d(16, 16, 5, 1, 2, groups=16), nn.BatchNorm2d(16), nn.Hardswish()])
        self.gate = stack([nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1)])
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        return self.head((x * F.hardsigmoid(self.gate(x))).mean((2, 3)))


class Mixer(nn.Module):
    """Tolstikhin et al., arXiv:2105.01601: linears over places, then over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm1, self.norm2 = nn.Conv2d(3, 32, 8, 8), nn.LayerNorm(32), nn.LayerNorm(32)
        self.places = stack([nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)])
        self.channels = stack([nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)])
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.places(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(self.norm2(x))).mean(1))


class Detector(nn.Module):
    """A feature pyramid (arXiv:1612.03144) with heads that share their weights, boxes and classes for each place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = block(3, 16, stride=2), block(16, 32, stride=2)
        self.side1, self.side2 = nn.Conv2d(16, 16, 1), nn.Conv2d(32, 16, 1)
        self.boxes, self.classes = nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(16, 5, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.one(x)
        b = self.two(a)
        high = self.side2(b)
        low = self.side1(a) + F.interpolate(high, scale_factor=2.0, mode="nearest")
        boxes = [self.boxes(f).flatten(2).transpose(1, 2) for f in (low, high)]
        classes = [self.classes(f).flatten(2).transpose(1, 2) for f in (low, high)]
        return torch.cat(boxes, 1), torch.cat(classes, 1).sigmoid()


class SpatialTransformer(nn.Module):
    """Jaderberg et al., arXiv:1506.02025: the image is sampled where a small network says."""

    def __init__(self) -> None:
        super().__init__()
        self.where = stack([block(3, 8, stride=2), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 6)])
        self.body, self.head = block(3, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.where(x).view(-1, 2, 3) * 0.1 + torch.eye(2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.head(self.body(F.grid_sample(x, grid, align_corners=False)).mean((2, 3)))


class Variational(nn.Module):
    """The means of an encoder, and what a decoder of transposed convolutions makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = stack([block(3, 8, stride=2), block(8, 16, stride=2), nn.Flatten(), nn.Linear(1024, 16)])
        self.wide = nn.Linear(8, 1024)
        self.decoder = stack([nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log = self.encoder(x).chunk(2, 1)
        return self.decoder(self.wide(mean).view(-1, 16, 8, 8)).sigmoid(), log.exp()


class Tagger(nn.Module):
    """Tokens, a recurrent layer in two directions, a tag for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(64, 16), nn.LSTM(16, 16, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(tokens))[0])


class Gated(nn.Module):
    """Two GRU layers; the last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[1][-1])


class Cells(nn.Module):
    """An LSTM cell in a loop of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 16)
        for step in range(3):
            h, c = self.cell(x[:, step], (h, c))
        return self.head(h)


class Reader(nn.Module):
    """Convolutions, then a recurrent layer over the columns (arXiv:1507.05717)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = stack([block(1, 8), nn.MaxPool2d(2), block(8, 16), nn.MaxPool2d((4, 2))])
        self.lstm, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.body(x).squeeze(2).transpose(1, 2)
        return self.head(self.lstm(columns)[0]).log_softmax(-1)


class Dilated(nn.Module):
    """Gated dilated convolutions that see only the past (arXiv:1609.03499)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 16, 1)
        self.filters = nn.ModuleList(nn.Conv1d(16, 16, 2, dilation=2**i) for i in range(3))
        self.gates = nn.ModuleList(nn.Conv1d(16, 16, 2, dilation=2**i) for i in range(3))
        self.mixes = nn.ModuleList(nn.Conv1d(16, 16, 1) for i in range(3))
        self.last = nn.Conv1d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skips = torch.zeros_like(x)
        for i, (f, g, mix) in enumerate(zip(self.filters, self.gates, self.mixes, strict=True)):
            past = F.pad(x, (2**i, 0))
            gated = torch.tanh(f(past)) * torch.sigmoid(g(past))
            skips = skips + gated
            x = x + mix(gated)
        return self.last(F.relu(skips))


class TemporalConvolutions(nn.Module):
    """Bai et al., arXiv:1803.01271, with the norm of the weights apart from their direction."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.one, self.two = norm(nn.Conv1d(4, 16, 3, dilation=1)), norm(nn.Conv1d(16, 16, 3, dilation=2))
        self.side, self.head = nn.Conv1d(4, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.one(F.pad(x, (2, 0))))
        y = F.relu(self.two(F.pad(y, (4, 0))))
        return self.head(F.relu(y + self.side(x))[:, :, -1])


class Conformer(nn.Module):
    """Gulati et al., arXiv:2005.08100: half a feed-forward, attention, a gated depthwise convolution, half again."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = self._feed(), self._feed()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm_conv, self.wide, self.narrow = nn.LayerNorm(16), nn.Conv1d(16, 32, 1), nn.Conv1d(16, 16, 1)
        self.depthwise, self.batch_norm = nn.Conv1d(16, 16, 5, padding=2, groups=16), nn.BatchNorm1d(16)
        self.last = nn.LayerNorm(16)

    @staticmethod
    def _feed() -> nn.Sequential:
        return stack([nn.LayerNorm(16), nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.before(x)
        n = self.norm(x)
        x = x + self.attention(n, n, n, need_weights=False)[0]
        gated = F.glu(self.wide(self.norm_conv(x).transpose(1, 2)), 1)
        x = x + self.narrow(F.silu(self.batch_norm(self.depthwise(gated)))).transpose(1, 2)
        return self.last(x + 0.5 * self.after(x))


def plain(name: str, family: str, build: type[nn.Module], /, **fields: object) -> Architecture:
    """A row; the inputs by the names of the arguments."""
    return Architecture(name=name, family=family, build=build, **fields)


def at_run_time(name: str, build: type[nn.Module], **fields: object) -> Architecture:
    """A recurrent network, whose layers are quantized at run time only."""
    return plain(name, "recurrent, at run time", build, setting="w8a8-dynamic", **fields)


def keywords() -> nn.Module:
    """A spotter of words: depthwise separable convolutions over a spectrogram (arXiv:1711.07128)."""
    layers = [block(1, 16, 5, 2), block(16, 16, 3, 1, 16), block(16, 16, 1), block(16, 16, 3, 1, 16), block(16, 16, 1)]
    return stack([*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12)])


def enlarge() -> nn.Module:
    """Shi et al., arXiv:1609.05158: a larger image out of channels."""
    return stack([nn.Conv2d(1, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2)])


def volumes() -> nn.Module:
    """Convolutions over time and space."""
    return stack([nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2),
                  nn.Conv3d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                  nn.Linear(8, 4)])  # fmt: skip


BATCH_IMAGE = {"x": image(batch="batch")}

NETWORKS = (
    plain("unet", "segmentation", UNet, inputs=BATCH_IMAGE, sizes=of_batch(), inductor=True),
    plain("diffusion-unet", "generation", DiffusionUNet, inputs={"x": image(side=16), "t": normal(2)}),
    plain("densenet", "image", Dense, inputs=BATCH_IMAGE, sizes=of_batch()),
    plain("inception", "image", Inception, inputs=BATCH_IMAGE, sizes=of_batch()),
    plain("shufflenet", "image", Shuffle, inputs={"x": image()}),
    plain("mobilenet-v3", "image", Squeeze, inputs=BATCH_IMAGE, sizes=of_batch(), inductor=True),
    plain("mlp-mixer", "image", Mixer, inputs={"x": image()}),
    plain("feature-pyramid", "detection", Detector, inputs={"x": image()}),
    plain("spatial-transformer", "image", SpatialTransformer, inputs={"x": image()}),
    plain("variational-autoencoder", "generation", Variational, inputs={"x": image()}),
    plain("pixel-shuffle", "generation", enlarge, inputs={"input": image(1, 16)}),
    plain("conv3d", "video", volumes, inputs={"input": normal("batch", 1, 4, 8, 8)}, sizes=of_batch()),
    at_run_time("lstm-tagger", Tagger, inputs={"tokens": integers(64, 2, 4)}),
    at_run_time("gru", Gated, inputs={"x": normal(2, 3, 8)}),
    at_run_time("lstm-cells", Cells, inputs={"x": normal("batch", 3, 8)}, sizes=of_batch(), inductor=True),
    at_run_time("crnn", Reader, inputs={"x": normal(2, 1, 8, 8)}),
    plain("wavenet", "sound", Dilated, inputs={"x": normal("batch", 1, "length")},
          sizes={"batch": Extent(2), "length": Extent(64, 40, 96)}),
    plain("tcn", "sound", TemporalConvolutions, inputs={"x": normal("batch", 4, 32)}, sizes=of_batch()),
    plain("conformer", "sound", Conformer, inputs={"x": normal("batch", 12, 16)}, sizes=of_batch()),
    plain("keyword-spotting", "sound", keywords, inputs={"input": normal("batch", 1, 20, 16)}, sizes=of_batch(),
          inductor=True),
)  # fmt: skip
"""Convolutional and recurrent networks."""
