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

    def measured(graph: torch.fx.GraphModule) -> float:
        signal = noise = 0.0
        for x in batches(2):
            exact = model()(x).detach().double()
            signal, noise = (
                signal + float(exact.square().sum()),
                noise + float((graph(x).detach() - exact).square().sum()),
            )
        return sqnr_db(signal, noise)

    assert toggled.sqnr_db == pytest.approx(measured(quant2e.convert_pt2e(prepared())), abs=1e-3)
    config = get_symmetric_quantization_config()
    quantizer = XNNPACKQuantizer().set_module_name("layers.7", config)
    alone = quant2e.prepare_pt2e(quant2e.capture(model(), (batches()[0],)), quantizer)
    quant2e.calibrate(alone, batches())
    row = toggled.of("linear_7")
    assert row.ops == ("linear_7",)
    assert row.sqnr_db_alone == pytest.approx(measured(quant2e.convert_pt2e(alone)), abs=0.5)


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
    with pytest.raises(Quant2eError, match="no observers"):
        sensitivity(model(), (batches()[0],), XNNPACKQuantizer(), batches())


class InPlace(nn.Module):
    """A residual that is added in place, as ResNets write it, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.second, self.in_place = nn.Linear(16, 16), nn.Linear(16, 16), in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        z = self.second(y)
        if self.in_place:
            z += y
        else:
            z = z + y
        return torch.tanh(z)


def written(in_place: bool) -> InPlace:
    torch.manual_seed(0)
    return InPlace(in_place).eval()


def test_in_place_is_as_any_other():
    found = [
        sensitivity(written(kind), (batches()[0],), xnnpack(), batches(), method="gradient") for kind in (True, False)
    ]
    first, second = ([row.sqnr_db_alone for row in one.rows] for one in found)
    assert first == pytest.approx(second, abs=0.01)


def test_frozen_parameters_and_integer_inputs():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(10, 16), nn.Linear(16, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.layer(self.table(ids))

    torch.manual_seed(0)
    ids = [torch.randint(0, 10, (8, 3)) for _ in range(4)]
    model = Tokens().eval().requires_grad_(False)
    found = sensitivity(model, (ids[0],), xnnpack(), ids, method="gradient")
    assert all(math.isfinite(row.sqnr_db_alone) for row in found.rows)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


def test_a_recurrent_layer_is_one_group_under_its_name():
    torch.manual_seed(0)
    data = [torch.randn(2, 4, 16) for _ in range(4)]
    quantizer = XNNPACKQuantizer().set_global("w8a8-dynamic")
    found = sensitivity(Recurrent().eval(), (data[0],), quantizer, data)
    assert {row.ops for row in found.rows} == {("lstm",), ("linear",)}
    assert all(math.isfinite(row.sqnr_db_alone) for row in found.rows)


class Branching(nn.Module):
    def __init__(self, outside: bool) -> None:
        super().__init__()
        self.first, self.second, self.outside = nn.Linear(16, 16), nn.Linear(16, 16), outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x) if self.outside else x
        return torch.cond(x.sum() > 0, self.second, lambda y: torch.relu(self.second(y)), (y,))


def test_bodies_are_left_out_and_it_says_so():
    data = [x.abs() * (1.0 if i % 2 else -1.0) for i, x in enumerate(batches())]
    found = sensitivity(Branching(True).eval(), (data[0],), xnnpack(), data)
    assert "stay float here" in found.notes[0]
    assert "note: " in str(found)
    with pytest.raises(Quant2eError, match="lies in bodies of control flow"):
        sensitivity(Branching(False).eval(), (data[0],), xnnpack(), data)


def test_state_begins_anew_for_every_evaluation():
    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)
            self.register_buffer("h", torch.zeros(32, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.h.mul_(0.9).add_(self.first(x))
            return self.second(self.h)

    torch.manual_seed(0)
    found = sensitivity(State().eval(), (batches()[0],), xnnpack(), batches(20))
    assert found.sqnr_db > 25.0
    assert all(row.sqnr_db_alone > found.sqnr_db - 1.0 for row in found.rows)
    assert all(row.sqnr_db_without > found.sqnr_db - 1.0 for row in found.rows)


def test_no_float_output_is_refused():
    class Index(Spread):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).argmax(-1)

    with pytest.raises(Quant2eError, match="has no float output"):
        sensitivity(Index().eval(), (batches()[0],), xnnpack(), batches())
