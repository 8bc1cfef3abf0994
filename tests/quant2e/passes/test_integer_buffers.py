"""Buffers of integers: a cache of keys and values, over several calls."""

import pytest
import torch
from torch import nn

import quant2e
from quant2e.errors import AnnotationError
from quant2e.ranges.sqnr import sqnr_db
from quantizers.xnnpack.quantizer import XNNPACKQuantizer


class Attention(nn.Module):
    """One step at a time, at a position that comes in."""

    def __init__(self, steps=6):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("keys", torch.zeros(1, steps, 8))
        self.register_buffer("values", torch.zeros(1, steps, 8))

    def forward(self, x, position):
        self.keys[:, position] = self.k(x)
        self.values.index_copy_(1, position, self.v(x))
        seen = torch.arange(self.keys.shape[1]) <= position
        scores = (self.q(x) @ self.keys.transpose(1, 2) / 3.0).masked_fill(~seen, -1e9)
        return self.out(scores.softmax(-1) @ self.values)


def steps(seed=0, count=6):
    torch.manual_seed(seed)
    return [(torch.randn(1, 1, 8), torch.tensor([i])) for i in range(count)]


def quantized(quantizer):
    torch.manual_seed(0)
    model = Attention().eval()
    graph = quant2e.prepare_pt2e(quant2e.capture(model, steps()[0]), quantizer)
    for seed in range(8):
        quant2e.calibrate(graph, steps(seed))
    return model, quant2e.convert_pt2e(graph)


def run(model, batches):
    with torch.no_grad():
        return torch.cat([model(*batch).clone() for batch in batches])


@pytest.fixture(scope="module")
def pair():
    return quantized(XNNPACKQuantizer().set_global("w8a8").set_buffer("keys").set_buffer("values"))


def test_state_over_several_calls(pair):
    model, converted = pair
    assert converted.keys.dtype == converted.values.dtype == torch.int8
    report = quant2e.report_of(converted)
    assert sum("48 bytes instead of 192" in note for note in report.notes) == 2
    batches = steps(100)
    got, again = run(converted, batches), run(converted, batches)
    assert torch.equal(got, again)  # every position was written anew
    exact = run(model, batches)
    assert 25 < sqnr_db(float(exact.square().sum()), float((exact - got).square().sum())) < 70
    assert int((converted.keys != 0).sum()) > 20


def test_files_keep_integers_and_state(pair, tmp_path):
    _, converted = pair
    run(converted, steps(1))
    quant2e.save(converted, tmp_path / "m.pt2", steps()[0])
    read = quant2e.load(tmp_path / "m.pt2")
    assert read.module.keys.dtype == torch.int8
    assert torch.equal(read.module.keys, converted.keys)
    assert torch.equal(run(read, steps(2)), run(converted, steps(2)))


def test_integer_form_keeps_the_state(pair):
    _, converted = pair
    integer = quant2e.to_integer(converted)
    assert torch.allclose(run(integer, steps(3)), run(converted, steps(3)), atol=0.05)


class Written(nn.Module):
    def __init__(self, how, initial=0.0):
        super().__init__()
        self.layer, self.how = nn.Linear(8, 8), how
        self.register_buffer("state", torch.full((2, 8), initial))

    def forward(self, x):
        return self.how(self, self.layer(x))


def copied(self, y):
    self.state[:1].copy_(y[:1])
    return self.state.sum() + y


def under_another_name(self, y):
    bits = self.state.view(torch.int32)
    self.state.copy_(y)
    return bits.sum() + y


def through_no_view(self, y):
    self.state.to(torch.float32).copy_(y)  # the buffer itself, which is of that dtype
    return self.state + y


def accumulated(self, y):
    self.state.add_(y)
    return self.state + y


def prepared(how, *args, name="state"):
    torch.manual_seed(0)
    model = Written(how, *args).eval()
    graph = quant2e.capture(model, (torch.randn(2, 8),))
    return quant2e.prepare_pt2e(graph, XNNPACKQuantizer().set_global("w8a8").set_buffer(name))


def test_an_initial_value_beyond_the_range_is_named():
    graph = quant2e.calibrate(prepared(copied, 50.0), [torch.randn(2, 8) for _ in range(8)])
    converted = quant2e.convert_pt2e(graph)
    assert converted.state.dtype == torch.int8
    assert any("its initial value moves by up to" in note for note in quant2e.report_of(converted).notes)


def test_memory_under_another_name_stays_float():
    graph = quant2e.calibrate(prepared(under_another_name), [torch.randn(2, 8) for _ in range(8)])
    with torch.no_grad():
        float_graph = quant2e.convert_pt2e(graph)
    assert float_graph.state.dtype == torch.float32
    assert any("may be the same memory under another name" in note for note in quant2e.report_of(float_graph).notes)


@pytest.mark.parametrize(
    ("how", "name", "message"),
    [
        (accumulated, "state", "does more than write values as they are"),
        (through_no_view, "state", "is written to through an op that is no plain view"),
        (copied, "stat", "this graph writes to no buffer 'stat'; did you mean 'state'"),
    ],
)
def test_what_cannot_be_integers_is_an_error(how, name, message):
    with pytest.raises(AnnotationError, match=message):
        prepared(how, name=name)


def test_a_buffer_has_one_scale():
    spec = quant2e.QuantizationSpec(torch.int8, quant2e.MinMaxObserver, -128, 127, torch.per_channel_affine, ch_axis=0)
    with pytest.raises(AnnotationError, match="one scale"):
        XNNPACKQuantizer().set_buffer("state", spec)


@pytest.mark.slow
def test_executorch_keeps_integers(pair):
    import lowering

    _, converted = pair
    program = lowering.to_executorch(converted, steps()[0], verify_inputs=steps(4))
    assert program.report.verification.passed


@pytest.mark.inductor
@pytest.mark.slow
def test_inductor_keeps_integers(pair):
    import lowering

    _, converted = pair
    program = lowering.to_inductor(converted, steps()[0], verify_inputs=steps(4))
    assert program.report.verification.passed
