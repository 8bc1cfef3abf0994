"""Whole networks, small, quantized for XNNPACK and run:
one delegate each, also where float ops stand between integer ones.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowering import to_executorch
from quant2e import quantize
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.quantizers.models import IMAGE


def block(inputs, outputs, size=3, activation=nn.ReLU, **kwargs):
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **kwargs)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), activation())


class HardSwish(nn.Module):
    def forward(self, x):
        return x * F.relu6(x + 3) / 6


class MobileNetV3(nn.Module):
    """An inverted residual with squeeze and excitation; hardswish is spelled out."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand = block(3, 8, activation=HardSwish), block(8, 16, 1, HardSwish)
        self.depthwise = block(16, 16, activation=HardSwish, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.head = block(16, 8, 1, nn.Identity), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
        x = x + self.project(y * F.hardsigmoid(gate))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DenseNet(nn.Module):
    """Norms in front of convolutions, and concatenations that grow."""

    def __init__(self):
        super().__init__()
        self.stem, self.transition, self.head = block(3, 8), nn.Conv2d(16, 8, 1), nn.Linear(8, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(inplace=True), nn.Conv2d(8 + 4 * i, 4, 3, padding=1))
            for i in range(2)
        )

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(F.avg_pool2d(self.transition(torch.cat(features, 1)), 2).mean([2, 3]))


class ShuffleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.head = block(3, 8), block(4, 4, groups=4), nn.Linear(8, 2)

    def forward(self, x):
        a, b = self.stem(x).chunk(2, dim=1)
        x = torch.cat((a, self.branch(b)), 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.head(x.mean([2, 3]))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.bottom, self.out = block(3, 8), block(8, 16), nn.Conv2d(16, 2, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)

    def forward(self, x):
        skip = self.down(x)
        return self.out(torch.cat([self.up(self.bottom(F.max_pool2d(skip, 2))), skip], 1))


NETWORKS = {"MobileNetV3": MobileNetV3, "DenseNet": DenseNet, "ShuffleNet": ShuffleNet, "U-Net": UNet}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_one_delegate(name):
    torch.manual_seed(0)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    result = quantize(NETWORKS[name]().eval(), IMAGE, quantizer, [IMAGE])
    report = to_executorch(result).report  # runs it, and raises where it disagrees
    assert (len(report.partitions), report.leftovers) == (1, ())
    assert report.verification is not None
    assert result.report.sqnr_db > 30
