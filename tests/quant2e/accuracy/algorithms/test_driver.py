"""The driver: what is kept, what is rolled back and why, and that nothing leaks into what the user gave."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quant2e
from quant2e.accuracy.algorithms import driver
from quant2e.accuracy.algorithms.algorithm import Algorithm, Stage
from quant2e.accuracy.algorithms.driver import float_difference
from quant2e.calibration import repeated_data
from quant2e.errors import CalibrationError
from quant2e.graph.captured.calls import Call
from quant2e.observers.base import is_observer_call
from quant2e.pipeline import quantize
from quant2e.report.report import Report
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.quant2e.annotators import DYNAMIC, WEIGHT, products

CAPTURED, CALIBRATED = Stage.CAPTURED, Stage.CALIBRATED


class Net(nn.Module):
    """A norm-free net whose first layer has one channel a thousand times larger than the others."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.first.weight[0] *= 1000.0
            self.second.weight[:, 0] /= 1000.0

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def batches(count=4, rows=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 8, generator=generator) for _ in range(count)]


def xnnpack():
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config())


@dataclass(frozen=True, slots=True)
class Rescale(Algorithm):
    """Divides the large channel by ``factor`` before the relu, and multiplies behind it: exact."""

    name: ClassVar[str] = "rescale"
    stage: ClassVar[Stage] = CAPTURED
    exact: ClassVar[bool] = True
    factor: float = 1000.0

    def apply(self, model, context):
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        weights["first.weight"][0] /= self.factor
        weights["first.bias"][0] /= self.factor
        weights["second.weight"][:, 0] *= self.factor
        for name, value in weights.items():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_parameter(leaf, nn.Parameter(value))
        return ["first, second: 1 of 8 channels"]


@dataclass(frozen=True, slots=True)
class Writes(Algorithm):
    """Adds ``amount`` to every weight, in place, whatever it should do."""

    name: ClassVar[str] = "writes"
    stage: ClassVar[Stage] = CAPTURED
    exact: ClassVar[bool] = False
    amount: float = 1.0

    def apply(self, model, context):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor += self.amount
            for call in context.calls:
                for x in call.args:
                    x.zero_()
        return ["everything"]


@dataclass(frozen=True, slots=True)
class WritesLate(Writes):
    name: ClassVar[str] = "writes late"
    stage: ClassVar[Stage] = CALIBRATED


@dataclass(frozen=True, slots=True)
class ClaimsExact(Writes):
    name: ClassVar[str] = "claims"
    exact: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Raises(Algorithm):
    name: ClassVar[str] = "raises"
    stage: ClassVar[Stage] = CAPTURED
    exact: ClassVar[bool] = True

    def apply(self, model, context):
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        torch.rand(3)
        raise ArithmeticError("no\nway")


@dataclass(frozen=True, slots=True)
class BreaksGraph(Algorithm):
    name: ClassVar[str] = "breaks"
    stage: ClassVar[Stage] = CALIBRATED
    exact: ClassVar[bool] = False

    def apply(self, model, context):
        for node in [n for n in model.graph.nodes if is_observer_call(n)]:
            node.replace_all_uses_with(node.all_input_nodes[0])
            model.graph.erase_node(node)
            delattr(model, str(node.target))
        return ["no observers left"]


@dataclass(frozen=True, slots=True)
class Nothing(Algorithm):
    name: ClassVar[str] = "nothing"
    stage: ClassVar[Stage] = CALIBRATED
    exact: ClassVar[bool] = False

    def apply(self, model, context):
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        return []


@dataclass(frozen=True, slots=True)
class Looks(Algorithm):
    """Keeps what it is shown."""

    name: ClassVar[str] = "looks"
    stage: ClassVar[Stage] = CAPTURED
    exact: ClassVar[bool] = True
    seen: list = field(default_factory=list)

    def apply(self, model, context):
        self.seen.extend(call.args[0].clone() for call in context.calls)
        prepared = context.prepare(model)
        assert any(is_observer_call(node) for node in prepared.graph.nodes)
        quant2e.convert_pt2e(prepared)
        return []


def outcomes(report: Report):
    return {step.name: step.outcome for step in report.algorithms}


def test_a_step_that_helps_is_kept_and_reported():
    plain = quantize(net(), batches()[0], xnnpack(), batches(), min_sqnr_db=None)
    mended = quantize(net(), batches()[0], xnnpack(), batches(), algorithms=[Rescale()])
    (step,) = mended.report.algorithms
    assert (step.name, step.outcome, step.reason) == ("rescale", "kept", "")
    assert step.before_db == pytest.approx(plain.report.sqnr_db)
    assert step.after_db == pytest.approx(mended.report.sqnr_db)
    assert step.after_db > step.before_db + 6
    line = f"algorithm rescale: kept, held-out SQNR {step.before_db:.1f} -> {step.after_db:.1f} dB, 1 change"
    assert line in str(mended.report)
    assert line in repr(mended.report)
    assert html.escape(line) in mended.report._repr_html_()
    assert "rescale: first, second: 1 of 8 channels" in str(mended.report)


def test_the_report_of_the_steps_is_saved(tmp_path):
    result = quantize(net(), batches()[0], xnnpack(), batches(), algorithms=[Rescale(), WritesLate()])
    result.save(tmp_path / "m.pt2")
    assert quant2e.load(tmp_path / "m.pt2").report.algorithms == result.report.algorithms
    assert outcomes(result.report) == {"rescale": "kept", "writes late": "rolled back"}


WRONG = {
    "claims": (ClaimsExact(0.01), "it changes the float result: output 0 of held-out batch 0 is off by"),
    "writes": (Writes(), "the held-out error grows"),
    "writes late": (WritesLate(), "the held-out error grows"),
    "raises": (Raises(), "it failed: ArithmeticError: no way"),
    "breaks": (BreaksGraph(), "it removes observers, and what they saw stays float: "),
    "nothing": (Nothing(), "it found nothing to change"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_step_that_does_harm_is_rolled_back_and_leaks_nothing(name):
    algorithm, reason = WRONG[name]
    model, data = net(), batches()
    before, kept = {k: v.clone() for k, v in model.state_dict().items()}, [x.clone() for x in data]
    captured = quant2e.capture(model, data[0])
    torch.manual_seed(7)
    state = torch.get_rng_state()
    result = quantize(captured, data[0], xnnpack(), data, algorithms=[algorithm], min_sqnr_db=None)
    assert torch.equal(torch.get_rng_state(), state)
    (step,) = result.report.algorithms
    assert step.outcome == ("no effect" if name == "nothing" else "rolled back")
    assert step.reason.startswith(reason)
    plain = quantize(model, data[0], xnnpack(), data, min_sqnr_db=None)
    assert torch.equal(result(data[0]), plain(data[0]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(map(torch.equal, data, kept))


@pytest.mark.slow
@given(
    st.lists(st.sampled_from([Rescale(), Rescale(0.5), *(made for made, _ in WRONG.values())]), max_size=4),
    st.sampled_from(["static", "dynamic", "weight-only"]),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_asked_for_the_result_is_no_worse_and_the_model_is_as_it_was(asked, kind):
    quantizer = {
        "static": products(),
        "dynamic": products(DYNAMIC, output=None),
        "weight-only": products(None, WEIGHT, None),
    }[kind]
    model, data = net(), batches(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = quantize(model, data[0], quantizer, data, min_sqnr_db=None)
    result = quantize(model, data[0], quantizer, data, algorithms=asked, min_sqnr_db=None)
    assert result.report.sqnr_db >= plain.report.sqnr_db
    assert len(result.report.algorithms) == len(asked)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    kept = [step for step in result.report.algorithms if step.outcome == "kept"]
    assert all(step.after_db >= step.before_db for step in kept)
    if not kept:
        assert torch.equal(result(data[0]), plain(data[0]))


def test_captured_steps_run_first_in_the_order_that_was_given():
    asked = [WritesLate(), Rescale(10.0), Nothing(), Rescale(100.0)]
    report = quantize(net(), batches()[0], xnnpack(), batches(), algorithms=asked, min_sqnr_db=None).report
    assert [step.name for step in report.algorithms] == ["rescale", "rescale", "writes late", "nothing"]


def test_what_measures_is_not_what_an_algorithm_sees():
    looks, data = Looks(), batches(20)
    result = quantize(net(), data[0], xnnpack(), data, algorithms=[looks], min_sqnr_db=None)
    assert result.report.sqnr_source == "3 held-out batches"
    held_out = {1, 9, 17}
    assert len(looks.seen) == 20 - len(held_out)
    assert not any(torch.equal(data[i], x) for i in held_out for x in looks.seen)


def test_shuffled_data_is_read_once():
    looks = Looks()
    loader = DataLoader(TensorDataset(torch.cat(batches(20))), batch_size=16, shuffle=True)
    quantize(net(), batches()[0], xnnpack(), loader, algorithms=[looks, Rescale()], min_sqnr_db=None)
    assert len({x[0, 0].item() for x in looks.seen}) == 17


@pytest.mark.parametrize("data", ["generator", "one buffer"])
def test_data_that_is_read_once_is_kept(data):
    def one_buffer():
        buffer = torch.empty(16, 8)
        for batch in batches():
            yield buffer.copy_(batch)

    given = one_buffer() if data == "one buffer" else (x for x in batches())
    result = quantize(net(), batches()[0], xnnpack(), given, algorithms=[Rescale()])
    again = quantize(net(), batches()[0], xnnpack(), batches(), algorithms=[Rescale()])
    assert result.report == again.report


def test_much_data_that_is_read_once_is_refused(monkeypatch):
    monkeypatch.setattr(repeated_data, "KEPT_BATCHES", 3)
    with pytest.raises(CalibrationError, match="read again \\(a list, a DataLoader\\), or fewer batches"):
        quantize(net(), batches()[0], xnnpack(), iter(batches()), algorithms=[Rescale()])
    loader = DataLoader(TensorDataset(torch.cat(batches())), batch_size=16, shuffle=True)
    with pytest.raises(CalibrationError, match="shuffle=False"):
        quantize(net(), batches()[0], xnnpack(), loader, algorithms=[Rescale()])


def test_much_data_is_read_again_and_trials_take_part_of_it(monkeypatch):
    plain = quantize(net(), batches()[0], xnnpack(), batches(12), algorithms=[Rescale()])
    monkeypatch.setattr(repeated_data, "KEPT_BATCHES", 4)
    monkeypatch.setattr(repeated_data, "LEARN_ON", 4)
    result = quantize(net(), batches()[0], xnnpack(), batches(12), algorithms=[Rescale(), WritesLate()])
    assert result.report.sqnr_source == "2 held-out batches"
    assert torch.equal(result(batches()[0]), plain(batches()[0]))
    assert outcomes(result.report) == {"rescale": "kept", "writes late": "rolled back"}


def test_without_data_the_report_says_what_measured():
    quantizer = products(None, WEIGHT, None)
    report = quantize(net(), batches()[0], quantizer, algorithms=[Rescale(1.0)], min_sqnr_db=None).report
    assert report.sqnr_source == "the example inputs"
    assert report.algorithms[0].reason == "measured on what it learned from: there is no other data"


def test_a_static_quantizer_without_data_fails_as_ever():
    with pytest.raises(CalibrationError):
        quantize(net(), batches()[0], xnnpack(), algorithms=[Rescale()])


@pytest.mark.parametrize("how", [{"int8_io": True}, {"use_reference_representation": True}])
def test_integer_forms(how):
    result = quantize(net(), batches()[0], xnnpack(), batches(), algorithms=[Rescale(), WritesLate()], **how)
    assert outcomes(result.report) == {"rescale": "kept", "writes late": "rolled back"}
    assert result.report.sqnr_db > 20


def test_dynamic_shapes():
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    result = quantize(
        net(), (batches()[0],), xnnpack(), batches(), dynamic_shapes=shapes, algorithms=[Rescale(), WritesLate()]
    )
    assert outcomes(result.report)["rescale"] == "kept"
    assert result(torch.randn(5, 8)).shape == (5, 4)


def test_a_model_that_returns_an_index_is_measured_at_its_last_float():
    class Classifier(Net):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    torch.manual_seed(0)
    result = quantize(
        Classifier().eval(), batches()[0], xnnpack(), batches(), algorithms=[Rescale(), ClaimsExact()], min_sqnr_db=None
    )
    assert outcomes(result.report) == {"rescale": "kept", "claims": "rolled back"}


def test_enough_is_enough():
    model, data = net(), batches()
    captured = quant2e.capture(model, data[0])
    prepared = quant2e.prepare_pt2e(captured, xnnpack())
    source = repeated_data.RepeatedData(data, Call((data[0],), {}))
    run = driver.Driver(captured, xnnpack(), source, enough_db=-100.0)
    mended = run.run(prepared, [driver.Attempt(Rescale()), driver.Attempt(Nothing())])
    assert [step.outcome for step in mended.steps] == ["not tried", "not tried"]
    assert "-100 dB are enough" in mended.steps[0].reason
    assert mended.captured is captured


DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_told_from_change(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)

    def off(by):
        return float_difference(lambda x: x, lambda x: x * (1 + by), [Call((x,), {})])

    assert off(DTYPES[dtype]) == ""
    assert "is off by" in off(0.1)


def test_outputs_that_are_zero_small_or_integers_count():
    def difference(a, b):
        return float_difference(lambda _: a, lambda _: b, [Call((0,), {})])

    big, zero, small = torch.full((8,), 1e6), torch.zeros(8), torch.full((8,), 1e-6)
    assert difference((big, small), (big, small * 1.01))
    assert not difference((zero,), (zero + 1e-8,))
    assert difference((zero,), (zero + 1e-5,))
    assert difference(torch.arange(10), torch.arange(1, 11))
    assert not difference(torch.arange(10), torch.arange(10))
    assert difference(zero, zero[:4])
