"""Recurrent layers written out step by step: the same numbers; products, settings and reports of the layer."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import quant2e
from quant2e import capture, convert_pt2e, prepare_qat_pt2e, quantize
from quant2e.graph.constants import Constants
from quant2e.graph.printer import graph_text
from quant2e.passes import run
from quantizers import X86InductorQuantizer, XNNPACKQuantizer, get_symmetric_quantization_config
from quantizers.rewrites import recurrent_to_linear
from quantizers.rewrites.recurrent_to_linear import RECURRENT, RecurrentAsLinear, why_whole

pytestmark = pytest.mark.filterwarnings("ignore:.*_flat_weights:UserWarning")

aten = torch.ops.aten


def rand(*sizes):
    return torch.randn(sizes)


def sqnr_db(expected, found):
    return 10 * torch.log10(expected.square().sum() / (expected - found).square().sum()).item()


LAYERS = {
    "lstm": (nn.LSTM(5, 4), (rand(6, 2, 5),)),
    "lstm, batch first, states given": (
        nn.LSTM(5, 4, 2, batch_first=True),
        (rand(2, 6, 5), (rand(2, 2, 4), rand(2, 2, 4))),
    ),
    "lstm, both directions, projected": (
        nn.LSTM(5, 4, 2, bidirectional=True, proj_size=3, bias=False),
        (rand(6, 2, 5), (rand(4, 2, 3), rand(4, 2, 4))),
    ),
    "lstm, dropout, unbatched": (nn.LSTM(5, 4, 2, dropout=0.5), (rand(6, 5),)),
    "gru": (nn.GRU(5, 4), (rand(6, 2, 5), rand(1, 2, 4))),
    "gru, both directions, batch first": (nn.GRU(5, 4, 2, bidirectional=True, batch_first=True), (rand(2, 6, 5),)),
    "gru, no bias": (nn.GRU(5, 4, bias=False), (rand(6, 2, 5),)),
    "rnn": (nn.RNN(5, 4), (rand(6, 2, 5), rand(1, 2, 4))),
    "rnn, relu, no bias": (nn.RNN(5, 4, nonlinearity="relu", bias=False), (rand(6, 2, 5),)),
    "lstm cell": (nn.LSTMCell(5, 4), (rand(2, 5), (rand(2, 4), rand(2, 4)))),
    "lstm cell, no state": (nn.LSTMCell(5, 4), (rand(5),)),
    "gru cell": (nn.GRUCell(5, 4), (rand(2, 5), rand(2, 4))),
    "gru cell, no bias, no state": (nn.GRUCell(5, 4, bias=False), (rand(2, 5),)),
    "rnn cell": (nn.RNNCell(5, 4), (rand(2, 5), rand(2, 4))),
    "rnn cell, relu": (nn.RNNCell(5, 4, nonlinearity="relu"), (rand(2, 5), rand(2, 4))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_float_result_is_that_of_the_layer(name):
    model, inputs = LAYERS[name]
    gm = capture(model.eval(), inputs)
    assert run(gm, (RecurrentAsLinear(lambda _: True),)) == {"recurrent_as_linear": 1}
    assert not any(node.target in RECURRENT for node in gm.graph.nodes)
    torch.testing.assert_close(gm(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    products = [node for node in gm.graph.nodes if node.target is aten.linear.default]
    assert len({node.args[1] for node in products}) <= len(list(model.parameters()))


class Filled(nn.Module):
    """A state that begins as zeros, and is written to."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(5, 4)

    def forward(self, x):
        h = torch.zeros(1, 2, 4)
        h[0].fill_(0.5)
        return self.layer(x, h)[0]


def test_a_state_that_is_written_to_is_not_zero():
    x = rand(3, 2, 5)
    gm = capture(Filled().eval(), (x,))
    expected = gm(x)
    run(gm, (RecurrentAsLinear(lambda _: True),))
    torch.testing.assert_close(gm(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_before_and_after(name, golden):
    gm = capture(type(LAYERS[name][0])(5, 4).eval(), (rand(2, 2, 5),))
    before = graph_text(gm.graph)
    run(gm, (RecurrentAsLinear(lambda _: True),))
    golden(f"rewrites/quantizers/{name}", f"{before}\n\n=>\n\n{graph_text(gm.graph)}")


class Tagger(nn.Module):
    """A recurrent layer and a classifier of every step."""

    def __init__(self, layer, classes=3):
        super().__init__()
        self.layer = layer
        width = getattr(layer, "proj_size", 0) or layer.hidden_size
        self.head = nn.Linear(width * (1 + getattr(layer, "bidirectional", False)), classes)

    def forward(self, *inputs):
        found = self.layer(*inputs)
        return self.head(found[0] if isinstance(found, tuple) else found), found


@pytest.mark.parametrize(
    ("name", "quantizer"),
    [
        ("lstm, both directions, projected", XNNPACKQuantizer),
        ("lstm, batch first, states given", X86InductorQuantizer),
        ("gru, both directions, batch first", X86InductorQuantizer),
        ("gru cell, no bias, no state", XNNPACKQuantizer),
        ("rnn, relu, no bias", XNNPACKQuantizer),
        ("lstm cell", X86InductorQuantizer),
    ],
)
def test_its_products_are_quantized_at_run_time(name, quantizer):
    torch.manual_seed(0)
    layer, inputs = LAYERS[name]
    model = Tagger(layer).eval()
    quantized = quantize(model, inputs, quantizer().set_global("w8a8-dynamic"), calibration_data=[inputs] * 2)
    assert quantized.report.int8_mac_share == 1
    expected, found = pytree.tree_leaves(model(*inputs)), pytree.tree_leaves(quantized(*inputs))
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert min(map(sqnr_db, expected, found)) > 30


def test_steps_share_one_weight():
    model = Tagger(nn.GRU(5, 4, 2)).eval()
    x = rand(7, 2, 5)
    quantized = quantize(model, (x,), XNNPACKQuantizer().set_global("w8a8-dynamic"), calibration_data=[(x,)] * 2)
    weights = [t for t in quantized.module.buffers() if t.dtype is torch.int8]
    assert sorted(tuple(t.shape) for t in weights) == [(3, 4), (12, 4), (12, 4), (12, 4), (12, 5)]
    assert not any(t.dim() > 1 and t.is_floating_point() for t in quantized.module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "quantizer"), [(nn.LSTM, X86InductorQuantizer), (nn.GRU, XNNPACKQuantizer), (nn.RNN, XNNPACKQuantizer)]
)
def test_200_steps(layer, quantizer, tmp_path):
    torch.manual_seed(0)
    model = Tagger(layer(8, 16)).eval()
    data = [(rand(200, 2, 8),) for _ in range(2)]
    quantized = quantize(model, data[0], quantizer().set_global("w8a8-dynamic"), calibration_data=data)
    assert quantized.report.int8_mac_share == 1
    expected, found = model(*data[1])[0], quantized(*data[1])[0]
    assert sqnr_db(expected, found) > 30
    assert sqnr_db(expected[-20:], found[-20:]) > 30, "errors do not pile up"
    quantized.save(tmp_path / "model.pt2")
    assert torch.equal(quant2e.load(tmp_path / "model.pt2")(*data[1])[0], found)


def verdicts(quantizer, model, *inputs, **keywords):
    report = quantize(model.eval(), inputs, quantizer, calibration_data=[inputs] * 2, **keywords).report
    return {v.op.name: (v.kind, v.reason) for v in report.verdicts}, report


@pytest.mark.parametrize("name", ["w8a8", None])
def test_a_layer_left_float_counts(name):
    model = Tagger(nn.LSTM(5, 4))
    quantizer = XNNPACKQuantizer().set_global(name or "w8a8-dynamic").set_module_type(nn.LSTM, name)
    found, report = verdicts(quantizer, model, rand(6, 2, 5))
    assert found["lstm"][0] == found["getitem"][0] == "float"
    assert ("set_module_name('layer', 'w8a8-dynamic')" if name else "module type") in found["lstm"][1]
    layer, head = 6 * 2 * 16 * (5 + 4), 6 * 2 * 4 * 3
    assert report.int8_mac_share == pytest.approx(head / (layer + head))


SETTINGS = {
    "type": lambda q: q.set_module_type(nn.LSTM, "w8a8-dynamic"),
    "module": lambda q: q.set_module_name("layer", "w8a8-dynamic"),
    "operator": lambda q: q.set_operator_type(aten.lstm, "w8a8-dynamic"),
    "node": lambda q: q.set_node("lstm", "w8a8-dynamic"),
    "predicate": lambda q: q.set_node(lambda node: node.target is aten.lstm.input, "w8a8-dynamic"),
    "filter": lambda q: q.set_global("w8a8-dynamic").set_filter_function(lambda node: node.name.startswith("lstm")),
    "not linear": lambda q: q.set_global("w8a8-dynamic").set_operator_type(aten.linear, None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_its_steps_have_the_settings_of_the_layer(name):
    found, report = verdicts(SETTINGS[name](X86InductorQuantizer()), Tagger(nn.LSTM(5, 4)), rand(6, 2, 5))
    assert (found["lstm"][0], found["linear"][0]) == ("dynamic", "float")
    assert found["lstm"][1] == "dynamic linear, dynamic linear + add (6 products of 'lstm')"
    assert report.int8_mac_share == pytest.approx(6 * 2 * 16 * 9 / (6 * 2 * 16 * 9 + 6 * 2 * 4 * 3))


def test_products_that_part_have_a_line_each():
    found, report = verdicts(
        XNNPACKQuantizer().set_global("w4a8-dynamic-g32"), Tagger(nn.GRU(5, 32)), rand(4, 2, 5), rand(1, 2, 32)
    )
    assert found["gru"] == ("dynamic", "dynamic linear (4 of 5 products of 'gru')")
    assert found["linear_default"][0] == "float"
    assert "no multiple of 32" in found["linear_default"][1]
    macs = [v.op.macs for v in report.verdicts]
    assert sum(macs) == 4 * 2 * 96 * (5 + 32) + 4 * 2 * 32 * 3


@pytest.mark.parametrize("recipe", ["w8", "w4-g32"])
def test_weights_alone(recipe):
    found, report = verdicts(X86InductorQuantizer().set_global(recipe), Tagger(nn.GRU(32, 32)), rand(4, 2, 32))
    assert found["gru"][0] == "weight-only"
    assert report.sqnr_db > 15


def test_a_varying_batch_is_quantized_and_varying_steps_are_not():
    model, x = Tagger(nn.LSTM(5, 4)).eval(), rand(6, 3, 5)
    data, quantizer = [(x,)] * 2, XNNPACKQuantizer().set_global("w8a8-dynamic")
    shapes = {"inputs": ({1: torch.export.Dim("batch", min=1, max=64)},)}
    quantized = quantize(model, (x,), quantizer, calibration_data=data, dynamic_shapes=shapes)
    assert quantized.report.int8_mac_share == 1
    other = rand(6, 9, 5)
    assert sqnr_db(model(other)[0], quantized(other)[0]) > 30
    shapes = {"inputs": ({0: torch.export.Dim.AUTO},)}
    found, _ = verdicts(quantizer, model, x, dynamic_shapes=shapes)
    assert found["lstm"] == ("float", why_varying := found["getitem"][1])
    assert why_varying.startswith("its number of steps varies")


def refusal(model, *inputs):
    gm = capture(model.eval(), inputs)
    (node,) = (node for node in gm.graph.nodes if node.target in RECURRENT)
    rewrite = RecurrentAsLinear(lambda _: True)
    assert run(gm, (rewrite,)) == {}
    return why_whole(node, Constants(gm.graph))


class Given(nn.Module):
    def forward(self, x, h, w, u):
        return torch.gru_cell(x, h, w, u)


def test_why_a_layer_stays_whole(monkeypatch):
    monkeypatch.setattr(recurrent_to_linear, "MOST_STEPS", 11)
    assert refusal(nn.RNN(1, 1, 2), rand(6, 1, 1)) == (
        "it has 6 steps in 2 layers and directions; up to 11 steps are quantized"
    )
    assert refusal(Given(), rand(2, 5), rand(2, 4), rand(12, 5), rand(12, 4)) == "its weights are not constant"
    graph = torch.fx.Graph()
    packed = graph.call_function(aten.lstm.data, tuple(graph.placeholder(name) for name in "abcd"))
    assert "pad them" in why_whole(packed, Constants(graph))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_reaches_every_weight_and_deploys_what_it_evaluated(dropout):
    torch.manual_seed(0)
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True, is_qat=True)
    x, wanted = rand(5, 4, 6), rand(5, 4, 3)
    model = capture(Tagger(nn.LSTM(6, 8, 2, dropout=dropout)).train(), (x,))
    prepared = prepare_qat_pt2e(model, XNNPACKQuantizer().set_global(config))
    optimizer, losses = torch.optim.Adam(prepared.parameters(), 1e-2), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (prepared(x)[0] - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    evaluated = prepared.eval()(x)[0]
    assert torch.equal(convert_pt2e(prepared)(x)[0], evaluated)
