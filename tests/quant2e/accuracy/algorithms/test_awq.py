"""AWQ: weights in groups of four bits lose less where activations are large, and the float result stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from quant2e.accuracy.algorithms.awq import Awq, awq
from quant2e.accuracy.output_error import output_sqnr
from quant2e.annotation.specs import QuantizationSpec
from quant2e.errors import CalibrationError, CaptureError, Quant2eError
from quant2e.observers.per_group import PerGroupMinMaxObserver
from quantizers import X86InductorQuantizer
from quantizers.x86 import get_default_x86_inductor_quantization_config
from tests.quant2e.annotators import INT4, Annotate, products

IN_GROUPS = QuantizationSpec(
    torch.int8, PerGroupMinMaxObserver.with_args(group_size=8), -7, 7, torch.per_channel_symmetric, ch_axis=0
)


class Gated(nn.Module):
    """Two blocks with an rms norm, whose activations have a few large channels, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(32) for _ in range(2))
        self.gates, self.ups = (nn.ModuleList(nn.Linear(32, 48, bias=False) for _ in range(2)) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(48, 32, bias=False) for _ in range(2))
        with torch.no_grad():
            for norm in self.norms:
                norm.weight[torch.tensor([3, 17, 30])] *= 20.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, gate, up, down in zip(self.norms, self.gates, self.ups, self.downs, strict=True):
            y = norm(x)
            x = x + down(nn.functional.silu(gate(y)) * up(y))
        return x


def gated() -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    torch.manual_seed(0)
    data = [torch.randn(4, 8, 32) for _ in range(4)]
    return quant2e.capture(Gated().eval(), (data[0],)), data


def weights_in(spec: QuantizationSpec) -> Annotate:
    return products(act=None, weight=spec, output=None)


def sqnr(model: nn.Module, data: list[torch.Tensor], quantizer: Annotate) -> float:
    found = quant2e.quantize(model, (data[0],), quantizer, data, min_sqnr_db=None).report.sqnr_db
    assert found is not None
    return found


def test_four_bits_in_groups_lose_less():
    captured, data = gated()
    mended = awq(captured, weights_in(IN_GROUPS), data, steps=4)
    assert output_sqnr(captured, mended, data) > 90.0
    plain, better = (sqnr(each, data, weights_in(IN_GROUPS)) for each in (captured, mended))
    assert better > plain + 1.5


def test_in_one_call():
    captured, data = gated()
    quantizer = weights_in(IN_GROUPS)
    result = quant2e.quantize(captured, (data[0],), quantizer, data, algorithms=[{"awq": {"steps": 2}}])
    (step,) = result.report.algorithms
    assert step.outcome == "kept"
    assert any("'rms_norm' → 'linear', 'linear_1'" in line for line in step.changes)


def test_it_is_for_weights_alone():
    captured, data = gated()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    result = quant2e.quantize(captured, (data[0],), quantizer, data, algorithms="auto")
    assert {step.name: step.outcome for step in result.report.algorithms}["awq"] == "not tried"


def test_bad_input_is_refused():
    captured, data = gated()
    with pytest.raises(CaptureError, match="call capture"):
        awq(nn.Linear(2, 2), weights_in(INT4), data)
    with pytest.raises(CalibrationError, match="needs a batch"):
        awq(captured, weights_in(INT4), [])
    with pytest.raises(Quant2eError, match="steps=0"):
        Awq(steps=0)
