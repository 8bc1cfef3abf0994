"""SmoothQuant: outlier channels in front of linears are smoothed, with an exponent of each group's own."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import quant2e
from quant2e.accuracy.algorithms.channels.scaling import channel_scaling
from quant2e.accuracy.algorithms.smooth import Smooth, smooth
from quant2e.accuracy.output_error import output_sqnr
from quant2e.errors import CalibrationError, CaptureError, Quant2eError
from quantizers import X86InductorQuantizer, XNNPACKQuantizer, get_symmetric_quantization_config
from quantizers.x86 import get_default_x86_inductor_quantization_config
from tests.quant2e.accuracy.algorithms.hard_nets import tokens, transformer


def x86() -> X86InductorQuantizer:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())


def xnnpack() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config())


def sqnr(model: nn.Module, data: list[torch.Tensor], quantizer: object) -> float:
    found = quant2e.quantize(model, (data[0],), quantizer, data, min_sqnr_db=None).report.sqnr_db
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("make", [x86, xnnpack])
def test_hard_transformers_are_as_good_as_soft_ones(make):
    data = tokens()
    soft, hard = (quant2e.capture(transformer(hard=hard), (data[0],)) for hard in (False, True))
    mended = smooth(hard, make(), data)
    assert output_sqnr(hard, mended, data) > 90.0
    wanted, bad, good = (sqnr(each, data, make()) for each in (soft, hard, mended))
    assert bad < wanted - 15.0
    assert good > wanted - 3.0


GUEST = """
import torch, quant2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as guest
from quant2e.accuracy.algorithms.smooth import smooth
from tests.quant2e.accuracy.algorithms.hard_nets import tokens, transformer
data = tokens()
make = lambda: guest.X86InductorQuantizer().set_global(guest.get_default_x86_inductor_quantization_config())
soft, hard = (quant2e.capture(transformer(hard=hard), (data[0],)) for hard in (False, True))
for model in (soft, hard, smooth(hard, make(), data)):
    print(quant2e.quantize(model, (data[0],), make(), data, min_sqnr_db=None).report.sqnr_db)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_under_a_quantizer_of_torchao():
    run = subprocess.run(
        [sys.executable, "-c", GUEST], capture_output=True, text=True, cwd=Path(__file__).parents[4], check=True
    )
    wanted, bad, good = map(float, run.stdout.split()[-3:])
    assert bad < wanted - 15.0
    assert good > wanted - 3.0


class Post(nn.Module):
    """A norm with an outlier channel that a linear and a residual read: nothing in front can take a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.last = nn.LayerNorm(16)
        with torch.no_grad():
            self.norm.weight[3] *= 300.0
            self.up.weight[:, 3] /= 300.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.last(y + self.down(nn.functional.gelu(self.up(y))))


def post() -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    torch.manual_seed(0)
    data = [torch.randn(8, 6, 16) for _ in range(3)]
    return quant2e.capture(Post().eval(), (data[0],)), data


@pytest.mark.parametrize("make", [x86, xnnpack])
def test_a_division_is_put_in_only_if_asked_for_and_only_where_it_pays(make):
    captured, data = post()
    before = [node.name for node in captured.graph.nodes]
    assert [node.name for node in smooth(captured, make(), data).graph.nodes] == before
    inserted = smooth(captured, make(), data, insert=True)
    assert output_sqnr(captured, inserted, data) > 90.0
    (division,) = (n for n in inserted.graph.nodes if n.target is torch.ops.aten.div.Tensor)
    assert division.args[0].name == "layer_norm"
    assert [node.name for node in captured.graph.nodes] == before
    prepared = quant2e.prepare_pt2e(inserted, make())
    (division,) = (n for n in prepared.graph.nodes if n.target is torch.ops.aten.div.Tensor)
    assert division.args[0].name == "layer_norm", "its operand stays float"


def test_the_formula_of_the_paper():
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), up to one factor for all channels."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        net[0].weight[2] *= 50.0
    x = torch.randn(16, 6)
    captured = quant2e.capture(net, (x,))
    weights = smooth(captured, x86(), [x], alpha=0.75).state_dict()
    wanted = net[0](x).abs().amax(0) ** 0.75 / net[1].weight.abs().amax(0) ** 0.25
    got = net[0].weight / weights["0.weight"]
    torch.testing.assert_close(got / got[0], (wanted / wanted[0]).detach())
    torch.testing.assert_close(weights["1.weight"], (net[1].weight * got).detach())


def test_values_of_attention_are_smoothed_by_their_projection():
    scaling = channel_scaling(quant2e.capture(transformer(hard=False), (tokens()[0],)))
    assert "'linear_1' → 'linear_2'" in {str(group) for group in scaling.groups}


def test_in_one_call():
    data = tokens()
    result = quant2e.quantize(transformer(hard=True), (data[0],), x86(), data, algorithms=[{"smooth": {"alpha": 0.5}}])
    (step,) = result.report.algorithms
    assert step.outcome == "kept"
    assert step.after_db > step.before_db + 15.0


def test_bad_input_is_refused():
    captured, data = post()
    with pytest.raises(CaptureError, match="call capture"):
        smooth(nn.Linear(2, 2), x86(), data)
    with pytest.raises(CalibrationError, match="needs a batch"):
        smooth(captured, x86(), [])
    with pytest.raises(Quant2eError, match="alpha=2"):
        Smooth(alpha=2.0)
    with pytest.raises(Quant2eError, match="whether a division pays"):
        Smooth(alpha=0.5, insert=True)
