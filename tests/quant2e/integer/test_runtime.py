"""The integer graph against XNNPACK in the ExecuTorch runtime: no difference, op by op and on whole networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowering
from benchmarks.demo.digits import DigitsNet
from quant2e import integer_report, quantize
from quant2e.integer import to_integer
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

pytest.importorskip("executorch")


class Of(nn.Module):
    """``function(layers, *inputs)``."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *inputs):
        return self.function(self.layers, *inputs)


IMAGE, ROWS, FLAT = (2, 8, 12, 12), (4, 8, 64), (64, 64)
OPS = {
    "conv2d": (lambda m, x: m[0](x), IMAGE, [nn.Conv2d(8, 16, 3, padding=1)]),
    "conv2d relu": (lambda m, x: F.relu(m[0](x)), IMAGE, [nn.Conv2d(8, 16, 3, stride=2)]),
    "conv2d relu6, dilated, no bias": (
        lambda m, x: F.relu6(m[0](x)),
        IMAGE,
        [nn.Conv2d(8, 16, 3, dilation=2, bias=False)],
    ),
    "depthwise, hardtanh": (lambda m, x: F.hardtanh(m[0](x), -0.5, 0.5), IMAGE, [nn.Conv2d(8, 8, 3, groups=8)]),
    "grouped conv2d": (lambda m, x: m[0](x), IMAGE, [nn.Conv2d(8, 8, 3, groups=2)]),
    "conv1d": (lambda m, x: m[0](x), (4, 8, 12), [nn.Conv1d(8, 8, 3)]),
    "conv_transpose2d": (lambda m, x: m[0](x), IMAGE, [nn.ConvTranspose2d(8, 6, 3, stride=2)]),
    "linear": (lambda m, x: m[0](x), FLAT, [nn.Linear(64, 48)]),
    "linear relu, no bias": (lambda m, x: F.relu(m[0](x)), ROWS, [nn.Linear(64, 48, bias=False)]),
    "add": (lambda m, x, y: x + y, FLAT, []),
    "add relu": (lambda m, x, y: F.relu(x + y), FLAT, []),
    "sub": (lambda m, x, y: x - y, FLAT, []),
    "mul": (lambda m, x, y: x * y, FLAT, []),
    "mean of 49": (lambda m, x: m[0](x).mean((2, 3), keepdim=True), (8, 8, 7, 7), [nn.Conv2d(8, 64, 1)]),
    "average of 30": (lambda m, x: F.adaptive_avg_pool2d(m[0](x), 1), (8, 8, 6, 5), [nn.Conv2d(8, 64, 1)]),
    "max_pool2d": (lambda m, x: F.max_pool2d(m[0](x), 3, 2, 1), IMAGE, [nn.Conv2d(8, 16, 1)]),
    "cat": (lambda m, x, y: torch.cat([m[0](x), m[1](y)], 1), IMAGE, [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)]),
    "clamp": (lambda m, x: m[0](x).clamp(-0.3, 0.4), IMAGE, [nn.Conv2d(8, 16, 1)]),
    "moves": (lambda m, x: m[0](x).permute(0, 2, 3, 1).reshape(2, -1)[:, 3:200], IMAGE, [nn.Conv2d(8, 16, 1)]),
}


def xnnpack(per_channel=True):
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=per_channel))


IN_EVERY_RUN = ("conv2d relu", "depthwise, hardtanh", "linear", "add relu", "mul", "cat", "moves")
"""One op of each arithmetic; the others take seconds each in the runtime, and run in the long target."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.slow) for name in OPS]
)
def test_ops_agree_with_the_runtime(name):
    function, shape, layers = OPS[name]
    inputs = function.__code__.co_argcount - 1
    for seed in range(2):
        torch.manual_seed(seed)
        for layer in layers:
            layer.reset_parameters()
        data = [tuple(torch.randn(shape) * (1 + i) * 0.7 + 0.1 for i in range(inputs)) for _ in range(3)]
        quantized = quantize(Of(function, *layers).eval(), data[0], xnnpack(per_channel=seed == 0), data)
        integer = to_integer(quantized.module, strict=True)
        program = lowering.to_executorch(quantized)
        for batch in data:
            assert torch.equal(integer(*batch), program(*batch))


def digits_net(seed):
    torch.manual_seed(seed)
    model = DigitsNet(width=8).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


class Plain(nn.Module):
    """Convolutions, pooling and a classifier of two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.c, self.d = nn.Linear(16 * 4, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.max_pool2d(F.relu(self.b(x)), 2)
        return self.d(F.relu(self.c(torch.flatten(x, 1))))


@pytest.mark.parametrize(
    "make", [lambda: digits_net(0), lambda: digits_net(1), Plain], ids=["residual", "another", "plain"]
)
def test_whole_networks_agree_with_the_runtime(make):
    model = make().eval()
    data = [torch.rand(8, 1, 8, 8) for _ in range(6)]
    quantized = quantize(model, (data[0],), xnnpack(), data)
    integer = to_integer(quantized.module, strict=True)
    assert all(v.integer for v in integer_report(integer).verdicts)
    program = lowering.to_executorch(quantized)
    for batch in data:
        assert torch.equal(integer(batch), program(batch))


def test_between_two_grids_xnnpack_multiplies_by_256ths():
    """The one kernel that differs: XNNPACK converts 8-bit tensors with a multiplier of 1/256 (qs8-vcvt).

    It can be steps away from the quotient; the integer graph multiplies in float, as the Q/DQ graph does.
    """
    scale, other = 0.05, 0.0507
    multiplier = round(256 * scale / other)
    off = [((q * multiplier + 128) >> 8) - round(q * scale / other) for q in range(-128, 128)]
    assert max(map(abs, off)) == 1
    assert sum(map(abs, off)) == 34
