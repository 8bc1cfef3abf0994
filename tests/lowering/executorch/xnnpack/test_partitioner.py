"""What XNNPACK fuses, pools and turns: one delegate, the numbers of the graph, and nothing in between."""

import torch
import torch.nn.functional as F
from torch import nn

from lowering import to_executorch
from quant2e import quantize, to_integer
from quantizers import XNNPACKQuantizer
from quantizers.xnnpack import get_symmetric_quantization_config

QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"


def lowered(model, x, *, is_dynamic=False):
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=is_dynamic)
    data = None if is_dynamic else [(torch.randn(x.shape),) for _ in range(4)]
    quantized = quantize(model.eval(), (x,), XNNPACKQuantizer().set_global(config), data)
    program = to_executorch(quantized, verify_inputs=[(torch.randn(x.shape),) for _ in range(2)])
    assert program.report.leftovers == ()
    (delegate,) = program.report.partitions
    return quantized, program, delegate.ops


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return (
            F.relu(a - b),
            F.relu(a * b),
            F.relu6(a - b.sigmoid()),
            F.hardtanh(a * b, -0.2, 0.5),
            (a + b).clamp(0.1, 0.9),
            F.relu(1 - a),
        )


def test_clamps_behind_sums_differences_and_products_are_theirs():
    x = torch.randn(2, 3, 4, 4)
    quantized, program, ops = lowered(Clamped(), x)
    assert program.report.verification.max_steps == 0
    # the input, two convolutions, a sigmoid, a number that is folded, and six results: none in front of its clamp
    assert sum(ops[f"aten.{op}.Tensor"] for op in ("add", "sub", "mul")) == 6
    assert ops[QUANTIZE] == 1 + 2 + 1 + 6
    integer = to_integer(quantized.module, strict=False)
    for got, expected in zip(integer(x), quantized(x), strict=True):
        assert (got - expected).abs().max() <= expected.abs().max() / 100


class Pools(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        x = F.max_pool1d(F.relu(self.a(x)), 3, 2, 1)
        return self.head(F.adaptive_avg_pool1d(self.b(F.avg_pool1d(x, 2)), 1).flatten(1))


def test_pools_of_sequences_are_those_of_images():
    _, program, ops = lowered(Pools(), torch.randn(2, 3, 22))
    assert program.report.verification.max_steps <= 1
    assert (ops["aten.max_pool2d.default"], ops["aten.avg_pool2d.default"], ops["aten.mean.dim"]) == (1, 1, 1)


def test_a_transposed_convolution_is_quantized_at_run_time():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)
    _, program, ops = lowered(layer, torch.randn(2, 4, 6, 6), is_dynamic=True)
    assert program.report.verification.max_abs_diff < 1e-4
    assert any("choose_qparams" in op for op in ops)
