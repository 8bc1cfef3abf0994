"""Half precision beside integers on XNNPACK: what it has kernels for runs right, the rest is refused with a way out."""

import pytest
import torch
from torch import nn

import lowering
from quant2e import LoweringError, Quant2eError, quantize
from quantizers import XNNPACKQuantizer

LINEARS, CONVOLUTIONS = (2, 5, 32), (3, 3, 6, 6)


def model(shape):
    torch.manual_seed(0)
    if len(shape) == 3:
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(16, 4)).eval()


def quantized(shape, recipe, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return quantize(model(shape).to(dtype), (x,), XNNPACKQuantizer().set_global(recipe), [(x,)], min_sqnr_db=None), x


@pytest.mark.parametrize(
    ("shape", "recipe"),
    [
        (LINEARS, "w8a8-dynamic"),
        pytest.param(LINEARS, "w4a8-dynamic-g32", marks=pytest.mark.slow),
        pytest.param(CONVOLUTIONS, "w8a8-dynamic", marks=pytest.mark.slow),
    ],
)
def test_dynamic_float16_runs(shape, recipe):
    result, x = quantized(shape, recipe, torch.float16)
    program = lowering.to_executorch(result)
    (delegate,) = program.report.partitions
    assert any("dequantize_per" in op for op in delegate.ops)
    assert program(x).dtype is torch.float16
    # what float16 itself keeps: 11 bits, of some hundred sums
    assert program.report.verification.sqnr_db > 45
    exact = model(shape)(x.float())
    error = (program(x).float() - exact).square().sum()
    floor = (result(x).float() - exact).square().sum()
    assert error < 1.3 * floor  # as near to the float model as the graph is


@pytest.mark.parametrize(("shape", "recipe"), [(LINEARS, "w8a8"), (LINEARS, "w4a8-dynamic"), (CONVOLUTIONS, "w8a8")])
def test_what_has_no_float16_kernel_is_refused(shape, recipe):
    result, _ = quantized(shape, recipe, torch.float16)
    with pytest.raises(LoweringError, match=r"is float16 and \d+ more\. Quantize model\.float\(\) instead"):
        lowering.to_executorch(result)


def test_bfloat16_is_not_quantized_and_says_so():
    with pytest.raises(Quant2eError, match=r"is a bfloat16 tensor, which is not quantized here: use model\.float\(\)"):
        quantized(LINEARS, "w8a8-dynamic", torch.bfloat16)
