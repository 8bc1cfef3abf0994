"""Sensitivity: what is built to hurt is found, by toggling and by gradient, from one calibration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import quant2e
from quant2e.accuracy.sensitivity import Sensitivity, sensitivity
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.ranges.sqnr import sqnr_db
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config


class Spread(nn.Module):
    """Eight linears with residuals; the third has a weight whose rows span three decades, undone behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
        spread = torch.logspace(-1.5, 1.5, 16)
        self.layers[2].weight.data *= spread[:, None]
        self.layers[2].bias.data *= spread
        self.register_buffer("undo", 1.0 / spread)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            y = layer(x)
            x = torch.tanh(y * self.undo if i == 2 else y) + x
        return x


def model() -> Spread:
    torch.manual_seed(0)
    return Spread().eval()


def batches(count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 16, generator=generator) for _ in range(count)]


def xnnpack() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config())


def prepared() -> torch.fx.GraphModule:
    graph = quant2e.prepare_pt2e(quant2e.capture(model(), (batches()[0],)), xnnpack())
    return quant2e.calibrate(graph, batches())


@pytest.fixture(scope="module")
def toggled() -> Sensitivity:
    return sensitivity(prepared(), data=batches(2))


@pytest.fixture(scope="module")
def differentiated() -> Sensitivity:
    return sensitivity(prepared(), data=batches(2), method="gradient")


def test_what_was_built_to_hurt_is_first(toggled, differentiated):
    for found in (toggled, differentiated):
        assert "linear_2" in found.rows[0].ops
        assert "layers.2" in found.rows[0].modules
        assert found.rows[0].sqnr_db_alone < found.rows[1].sqnr_db_alone - 6.0


def test_leaving_it_float_helps_most(toggled):
    best = max(toggled.rows, key=lambda row: row.sqnr_db_without)
    assert best is toggled.rows[0]
    assert best.sqnr_db_without > toggled.sqnr_db + 6.0


def test_alone_and_without_are_evaluations_of_the_model(toggled):
    """All quantized is what convert gives; a group alone is what a configuration of that layer alone gives."""
    signal = noise = 0.0
    converted = quant2e.convert_pt2e(prepared())
    for x in batches(2):
        exact = model()(x).detach().double()
        signal, noise = signal + float(exact.square().sum()), noise + float((converted(x) - exact).square().sum())
    assert toggled.sqnr_db == pytest.approx(sqnr_db(signal, noise), abs=1e-3)


def test_one_row_for_every_quantized_op(toggled):
    report = quant2e.report_of(prepared())
    ops = [op for row in toggled.rows for op in row.ops]
    assert sorted(ops) == sorted(verdict.op.name for verdict in report.verdicts if verdict.quantized)
    assert toggled.of("linear_2") is toggled.rows[0]


def test_the_gradient_ranks_as_toggling_does(toggled, differentiated):
    """Spearman's rank correlation, and the estimate of every group that matters within 3 dB."""
    order = {row.ops: place for place, row in enumerate(toggled.rows)}
    places = [order[row.ops] for row in differentiated.rows]
    count = len(places)
    assert count == len(order) >= 8
    rank = 1.0 - 6.0 * sum((a - b) ** 2 for a, b in enumerate(places)) / (count * (count**2 - 1))
    assert rank > 0.7
    for row in toggled.rows[:4]:
        assert differentiated.of(row.ops[0]).sqnr_db_alone == pytest.approx(row.sqnr_db_alone, abs=3.0)
    assert all(row.sqnr_db_without is None for row in differentiated.rows)


def test_from_a_model_as_from_its_calibrated_graph():
    found = sensitivity(model(), (batches()[0],), xnnpack(), batches(10))
    assert "linear_2" in found.rows[0].ops
    assert found.batches == 2


def test_dynamic_and_weight_only(toggled):
    config = get_symmetric_quantization_config(is_dynamic=True, is_per_channel=True)
    found = sensitivity(model(), (batches()[0],), XNNPACKQuantizer().set_global(config), batches())
    assert found.sqnr_db > toggled.sqnr_db
    assert len(found.rows) == 8


def test_nothing_is_changed():
    eager = model()
    before = {key: value.clone() for key, value in eager.state_dict().items()}
    sensitivity(eager, (batches()[0],), xnnpack(), batches(), method="gradient")
    assert all(torch.equal(value, before[key]) for key, value in eager.state_dict().items())
    assert all(p.grad is None for p in eager.parameters())


def test_text(toggled):
    assert str(toggled).splitlines()[0].startswith("Sensitivity (toggle): ")
    assert str(toggled).count("dB alone") == len(toggled.rows)
    assert toggled.as_dict()["rows"][0]["ops"] == list(toggled.rows[0].ops)
    assert "<table>" in toggled._repr_html_()
    assert math.isfinite(toggled.rows[0].sqnr_db_alone)


def test_bad_input():
    with pytest.raises(Quant2eError, match="method='hessian'"):
        sensitivity(prepared(), data=batches(), method="hessian")
    with pytest.raises(CalibrationError, match="num_batches"):
        sensitivity(prepared(), data=batches(), num_batches=0)
    with pytest.raises(CalibrationError, match="at least one batch"):
        sensitivity(prepared(), data=[])
    with pytest.raises(Quant2eError, match="example_inputs, a quantizer and data"):
        sensitivity(model(), data=batches())
    with pytest.raises(Quant2eError, match="pass the data as data="):
        sensitivity(prepared(), batches()[0], data=batches())
    with pytest.raises(Quant2eError, match="nothing to measure|quantized none|no observers"):
        sensitivity(model(), (batches()[0],), XNNPACKQuantizer(), batches())
