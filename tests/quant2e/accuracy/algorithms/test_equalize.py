"""Equalization: it undoes the spread of hard nets under every quantizer, and keeps the float result."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import quant2e
from quant2e.accuracy.algorithms.channels.scaling import channel_scaling, channels_left
from quant2e.accuracy.algorithms.equalize import Equalize, equalize, equalizing_factors
from quant2e.accuracy.output_error import output_sqnr
from quant2e.calibration.batches import check_batch
from quant2e.errors import CalibrationError, CaptureError, Quant2eError
from quantizers import X86InductorQuantizer, XNNPACKQuantizer, get_symmetric_quantization_config
from quantizers.x86 import get_default_x86_inductor_quantization_config
from tests.quant2e.accuracy.algorithms.hard_nets import depthwise, images, tokens, transformer

QUANTIZERS = {
    "xnnpack": lambda: XNNPACKQuantizer().set_global(get_symmetric_quantization_config()),
    "xnnpack per channel": lambda: XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True)
    ),
    "x86": lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
}


def sqnr(model: nn.Module, data: list[torch.Tensor], quantizer: object) -> float:
    found = quant2e.quantize(model, (data[0],), quantizer, data, min_sqnr_db=None).report.sqnr_db
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("make", "data", "name"),
    [
        pytest.param(
            make,
            data,
            name,
            marks=[] if (make, name) == (depthwise, "x86") else pytest.mark.slow,
            id=f"{make.__name__} {name}",
        )
        for make, data in ((depthwise, images()), (transformer, tokens()))
        for name in QUANTIZERS
    ],
)
def test_hard_nets_are_as_good_as_soft_ones(make, data, name):
    soft, hard = (quant2e.capture(make(hard=hard), (data[0],)) for hard in (False, True))
    assert output_sqnr(soft, hard, data) > 90.0
    mended = equalize(hard, data if name == "x86" else ())
    assert output_sqnr(hard, mended, data) > 90.0
    wanted, bad, good = (sqnr(each, data, QUANTIZERS[name]()) for each in (soft, hard, mended))
    assert bad < wanted - 15.0
    assert good > wanted - 3.0


def test_in_one_call():
    hard, data = depthwise(hard=True), images()
    result = quant2e.quantize(hard, (data[0],), QUANTIZERS["x86"](), data, algorithms=["equalize"])
    (step,) = result.report.algorithms
    assert step.outcome == "kept"
    assert step.after_db > step.before_db + 15.0
    assert any("'batch_norm_1' → 'batch_norm_2': 16 channels" in line for line in step.changes)


GUEST = """
import torch, quant2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as guest
from quant2e.accuracy.algorithms.equalize import equalize
from tests.quant2e.accuracy.algorithms.hard_nets import depthwise, images
data = images()
for hard in (False, True):
    captured = quant2e.capture(depthwise(hard=hard), (data[0],))
    for model in (captured, equalize(captured)):
        quantizer = guest.X86InductorQuantizer().set_global(guest.get_default_x86_inductor_quantization_config())
        print(quant2e.quantize(model, (data[0],), quantizer, data, min_sqnr_db=None).report.sqnr_db)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_under_a_quantizer_of_torchao():
    run = subprocess.run(
        [sys.executable, "-c", GUEST], capture_output=True, text=True, cwd=Path(__file__).parents[4], check=True
    )
    wanted, _, bad, good = map(float, run.stdout.split()[-4:])
    assert bad < wanted - 15.0
    assert good > wanted - 3.0


def test_ranges_of_a_pair_become_equal():
    """The known answer of the paper: both ranges are sqrt(r1 · r2), up to one factor for the whole tensor."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net[0].weight *= torch.logspace(-2, 2, 6)[:, None]
    mended = equalize(quant2e.capture(net, torch.randn(2, 4)))
    weights = mended.state_dict()
    rows, columns = weights["0.weight"].abs().amax(1), weights["2.weight"].abs().amax(0)
    before = net[0].weight.abs().amax(1), net[2].weight.abs().amax(0)
    torch.testing.assert_close(rows / columns, (rows / columns)[0].expand(6), rtol=1e-2, atol=0.0)
    torch.testing.assert_close(rows * columns, (before[0] * before[1]).detach())


def test_relu6_keeps_its_bound():
    """A bound of its own for each channel, behind a relu that backends fuse; the paper drops the bound."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        net[0].weight *= torch.logspace(-1, 2, 8)[:, None, None, None]
    x = torch.randn(4, 3, 6, 6)
    captured = quant2e.capture(net, x)
    mended = equalize(captured)
    assert output_sqnr(captured, mended, [x]) > 90.0
    assert [n.target._opname for n in mended.graph.nodes if n.op == "call_function"] == [
        "conv2d", "relu", "minimum", "conv2d",
    ]  # fmt: skip


def test_nothing_is_changed_where_ranges_are_close():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    captured = quant2e.capture(net, torch.randn(2, 16))
    assert (equalizing_factors(captured, channel_scaling(captured)) == 1.0).all()


class Tied(nn.Module):
    """A table that is read by rows and as the weight of a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.up = nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.norm(torch.tanh(self.up(self.table(x)))), self.table.weight)


def test_what_is_left_has_a_reason():
    captured = quant2e.capture(Tied().eval(), torch.arange(4))
    scaling = channel_scaling(captured)
    assert channels_left(captured) == scaling.left
    assert scaling.groups == ()
    assert "its weight is also read by embedding" in scaling.left["layer_norm"]
    assert "tanh" in scaling.left["linear"]
    assert "'linear': left, 'tanh'" in str(scaling)


def test_a_layer_that_is_called_twice_takes_one_factor():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        layer.weight *= torch.logspace(-2, 2, 8)[:, None]
    x = torch.randn(4, 4)
    captured = quant2e.capture(net, x)
    mended = equalize(captured)
    assert output_sqnr(captured, mended, [x]) > 90.0
    weights = mended.state_dict()
    assert not torch.equal(weights["2.weight"], layer.weight)
    assert torch.equal(weights["2.weight"], weights["4.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_keep_their_digits(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype).eval()
    with torch.no_grad():
        net[0].weight *= torch.logspace(-2, 1, 8)[:, None].to(dtype)
    x = torch.randn(4, 8, dtype=dtype)
    captured = quant2e.capture(net, x)
    mended = equalize(captured)
    assert not torch.equal(mended.state_dict()["0.weight"], net[0].weight)
    assert torch.equal(captured(x), mended(x))


def test_bad_input_is_refused():
    with pytest.raises(CaptureError, match="call capture"):
        equalize(nn.Linear(2, 2))
    captured = quant2e.capture(nn.Linear(2, 2).eval(), torch.randn(1, 2))
    with pytest.raises(CalibrationError, match="wrap a single batch"):
        equalize(captured, torch.randn(1, 2))
    with pytest.raises(Quant2eError, match="max_sweeps=0"):
        Equalize(max_sweeps=0)


class SkipConcatenation(nn.Module):
    """A U-Net of two levels: one conv reads what two others make, and one of those is read by a third."""

    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x):
        skip = torch.relu(self.down(x))
        deep = torch.relu(self.deep(nn.functional.max_pool2d(skip, 2)))
        return self.out(torch.cat([self.up(deep), skip], 1))


@pytest.mark.parametrize("calls", [0, 4])
def test_channels_that_only_some_readers_read_do_not_run_away(calls):
    torch.manual_seed(0)
    model, data = SkipConcatenation().eval(), [torch.randn(2, 3, 8, 8) for _ in range(4)]
    with torch.no_grad():
        model.down.weight *= 10.0 ** torch.linspace(-0.5, 0.5, 8)[:, None, None, None]
    captured = quant2e.capture(model, (data[0],))
    scaling = channel_scaling(captured)
    (group,) = [each for each in scaling.groups if len(each.makers) == 2]
    factors = equalizing_factors(captured, scaling, [check_batch(x, "data") for x in data[:calls]])[group.channels]
    assert 0.1 < float(factors.min()) <= float(factors.max()) < 10.0
    equalized = equalize(captured, data[:calls])
    assert sqnr(equalized, data, QUANTIZERS["xnnpack"]()) > sqnr(captured, data, QUANTIZERS["xnnpack"]()) - 1.0
