"""Conversion: the graphs it writes, the numbers in them, the tensors that stay, and what it refuses."""

import copy
import math

import pytest
import torch
from torch import nn

from quant2e.annotation.specs import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    SharedQuantizationSpec,
)
from quant2e.calibration.calibrate import calibrate
from quant2e.convert.convert import convert_pt2e
from quant2e.convert.insert_qdq import TAG
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.graph.captured.capture import capture
from quant2e.graph.printer import graph_text
from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE, qd
from quant2e.observers.measuring import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from quant2e.prepare.prepare import prepare_pt2e
from quant2e.ranges import search as range_search
from quant2e.report.record import record_of
from tests.quant2e.annotators import (
    ACT,
    DYNAMIC,
    HALF,
    INT4,
    NOTHING,
    WEIGHT,
    WEIGHT_PER_TENSOR,
    Annotate,
    aten,
    on,
    products,
)

UINT8 = QuantizationSpec(torch.uint8, MinMaxObserver, 0, 255, torch.per_tensor_affine)


def linear():
    """Weights on a grid, so that every scale in a golden text is exact."""
    model = nn.Linear(4, 3).eval()
    with torch.no_grad():
        model.weight.copy_(torch.arange(-6.0, 6.0).view(3, 4) / 8)
        model.bias.copy_(torch.tensor([0.5, -0.25, 1.0]))
    return model


DATA = [torch.linspace(-1, 1, 8).view(2, 4), torch.linspace(-2, 2, 8).view(2, 4)]


def converted(model, quantizer, data=DATA, example=None, **options):
    prepared = prepare_pt2e(capture(model, data[0] if example is None else example), quantizer)
    if data is not None:
        calibrate(prepared, data)
    return convert_pt2e(prepared, **options)


RECIPES = {
    "static_per_channel": products(),
    "static_per_tensor": products(weight=WEIGHT_PER_TENSOR),
    "dynamic": products(act=DYNAMIC, output=None),
    "weight_only": products(act=None, output=None),
    "int4": products(act=DYNAMIC, weight=INT4, output=None),
    "float16": products(act=HALF, weight=HALF, output=None),
}


@pytest.mark.parametrize("name", RECIPES)
def test_golden(golden, name):
    gm = converted(linear(), RECIPES[name])
    held = "\n".join(f"{key}: {str(t.dtype)[6:]}{list(t.shape)}" for key, t in gm.state_dict().items())
    golden(f"graphs/linear_{name}", f"{graph_text(gm.graph)}\n\n{held}")


@pytest.mark.parametrize("name", ["dynamic", "weight_only", "int4", "float16"])
def test_what_needs_no_calibration(name):
    model = linear()
    prepared = prepare_pt2e(capture(model, DATA[0]), RECIPES[name])
    gm = convert_pt2e(prepared)
    assert torch.allclose(gm(DATA[1]), model(DATA[1]), atol=0.3 if name == "int4" else 0.03)


def test_the_numbers_of_a_static_linear():
    """The Q/DQ graph is arithmetic that can be written down."""
    model = linear()
    gm = converted(model, products())
    x = DATA[1]

    def fake(t, scale, zero, low, high):
        return (torch.clamp(torch.round(t * (1 / scale)) + zero, low, high) - zero) * scale

    act = torch.tensor(4.0 / 255)
    weight_scale = model.weight.abs().amax(1, keepdim=True) / 127
    weight = fake(model.weight, weight_scale, 0, -127, 127)
    y = nn.functional.linear(fake(x, act, -1, -128, 127), weight, model.bias)
    record = record_of(gm)
    encodings = {str(g.points[0]): e for g, e in zip(record.plan.groups, record.encodings, strict=True)}
    assert encodings["input_1 -> linear"].scale == pytest.approx(4.0 / 255, rel=1e-7)
    assert encodings["input_1 -> linear"].zero_point == -1
    assert torch.allclose(encodings["weight -> linear"].scale, weight_scale.flatten())
    outputs = model(torch.cat(DATA)).detach()
    span = float(outputs.max() - outputs.min())
    assert encodings["linear"].scale == pytest.approx(span / 255, rel=1e-6)
    out = encodings["linear"]
    assert torch.equal(gm(x), fake(y, torch.tensor(out.scale), out.zero_point, -128, 127))


def test_four_bits_are_a_narrow_range_on_int8():
    gm = converted(linear(), RECIPES["int4"])
    weight = gm.get_buffer("weight_quantized")
    assert weight.dtype == torch.int8
    assert (weight.min().item(), weight.max().item()) == (-8, 7)


# ------------------------------------------------------------------------------------------------ what the module holds


def test_float_copies_are_gone():
    gm = converted(nn.Sequential(linear(), nn.ReLU(), nn.Linear(3, 2)).eval(), products())
    assert sorted(gm.state_dict()) == sorted(
        f"{i}.{name}" for i in "02" for name in ("bias", "weight_quantized", "weight_scale", "weight_zero_point")
    )
    assert {t.dtype for n, t in gm.state_dict().items() if n.endswith("quantized")} == {torch.int8}
    assert not [n for n, _ in gm.named_modules() if "activation_post_process" in n]


def test_without_folding_the_weight_stays_float():
    model = linear()
    gm = converted(model, products(), fold_quantize=False)
    assert gm.get_parameter("weight").dtype == torch.float32
    assert [n.target for n in gm.graph.nodes].count(qd.quantize_per_channel.default) == 1
    assert torch.equal(gm(DATA[1]), converted(model, products())(DATA[1]))


def test_the_users_parameters_are_shared_not_copied():
    model = linear()
    gm = converted(model, products())
    assert gm.get_parameter("bias") is model.bias


def test_tied_weights_are_stored_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).relu())

    gm = converted(Tied().eval(), products())
    assert [t.dtype for t in gm.state_dict().values()].count(torch.int8) == 1
    shared = {t.data_ptr() for n, t in gm.state_dict().items() if t.dtype == torch.int8}
    assert len(shared) == 1


def test_a_weight_quantized_in_two_ways_is_stored_twice_and_not_in_float():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return nn.functional.linear(x, self.weight) + nn.functional.embedding(torch.tensor([0, 1]), self.weight)

    def note(node):
        if node.target is aten.linear.default:
            return QuantizationAnnotation({node.args[0]: ACT, node.args[1]: WEIGHT})
        if node.target is aten.embedding.default:
            return QuantizationAnnotation({node.args[0]: UINT8})
        return None

    gm = converted(Twice().eval(), Annotate(note))
    dtypes = sorted(str(t.dtype) for n, t in gm.state_dict().items() if "quantized" in n)
    assert dtypes == ["torch.int8", "torch.uint8"]
    assert "weight" not in gm.state_dict()


def test_a_weight_that_is_also_read_in_float_stays():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return nn.functional.linear(x, self.weight) + self.weight.sum()

    gm = converted(Both().eval(), products())
    assert gm.state_dict()["weight"].dtype == torch.float32
    assert gm.state_dict()["weight_quantized"].dtype == torch.int8


# ------------------------------------------------------------------------------------------------------- graph shapes


class Diamond(nn.Module):
    def forward(self, x):
        y = x.relu()
        return (y + y) * y.sigmoid(), torch.cat([y, y])


def everything(node):
    return QuantizationAnnotation(dict.fromkeys(node.all_input_nodes, ACT), ACT)


def test_one_dequantize_for_each_consumer():
    gm = converted(Diamond().eval(), Annotate(everything))
    for node in gm.graph.nodes:
        if node.target in DEQUANTIZE:
            assert len(node.users) == 1
        if node.target in QUANTIZE:
            assert len({u for u in node.users if u.target in DEQUANTIZE}) == len(node.users)
    relu = next(n for n in gm.graph.nodes if n.target is aten.relu.default)
    (q,) = relu.users
    assert len(q.users) == 3  # add, sigmoid, cat: each reads it once, however often it uses it
    add = next(n for n in gm.graph.nodes if n.target is aten.add.Tensor)
    cat = next(n for n in gm.graph.nodes if n.target is aten.cat.default)
    assert add.args[0] is add.args[1]
    assert cat.args[0][0] is cat.args[0][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["static_per_channel", "dynamic", "weight_only", "float16"])
def test_half_precision_models_stay_in_their_dtype(dtype, name):
    model = linear().to(dtype)
    data = [d.to(dtype) for d in DATA]
    gm = converted(model, RECIPES[name], data)
    out = gm(data[1])
    assert out.dtype == dtype
    assert torch.allclose(out, model(data[1]), atol=0.06)
    for node in gm.graph.nodes:
        if node.target in DEQUANTIZE:
            assert node.kwargs == {"out_dtype": dtype}
            assert node.meta["val"].dtype == dtype


def test_metadata_agrees_with_what_runs():
    gm = converted(Diamond().eval(), Annotate(everything))

    class Checks(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                assert (result.dtype, result.shape) == (n.meta["val"].dtype, n.meta["val"].shape), n
            return result

    Checks(gm).run(DATA[0])


def test_quantization_of_the_graphs_inputs_and_outputs():
    class Two(nn.Module):
        def forward(self, x, y):
            return x, y.relu()

    def note(node):
        return QuantizationAnnotation({node.args[0]: ACT}, SharedQuantizationSpec((node.args[0], node)))

    captured = capture(Two().eval(), (DATA[0], DATA[0]))
    prepared = prepare_pt2e(captured, Annotate(note))
    calibrate(prepared, [(DATA[0], DATA[1])])
    x, y = convert_pt2e(prepared)(DATA[0], DATA[1])
    assert torch.equal(x, DATA[0])
    assert torch.allclose(y, DATA[1].relu(), atol=4 / 255)


# ------------------------------------------------------------------------------------------------------ special specs


def test_derived_bias_is_an_int32_buffer():
    def note(node):
        if node.target is not aten.linear.default:
            return None
        x, w, b = node.args

        def derive(sources):
            (act, _), (weight, _) = (s.calculate_qparams() for s in sources)
            return act * weight, torch.zeros_like(weight, dtype=torch.int32)

        bias = DerivedQuantizationSpec(
            [(x, node), (w, node)], derive, torch.int32, -(2**31), 2**31 - 1, torch.per_channel_symmetric, ch_axis=0
        )
        return QuantizationAnnotation({x: ACT, w: WEIGHT, b: bias})

    model = linear()
    gm = converted(model, Annotate(note))
    bias, scale = gm.get_buffer("bias_quantized"), gm.get_buffer("bias_scale")
    assert bias.dtype == torch.int32
    assert torch.equal(scale, torch.tensor(torch.tensor(4.0).div(255).item()) * gm.get_buffer("weight_scale"))
    assert torch.equal(bias, torch.round(model.bias * (1 / scale)).to(torch.int32))
    assert "bias" not in gm.state_dict()
    assert torch.allclose(gm(DATA[1]), model(DATA[1]), atol=0.02)


def test_fixed_parameters():
    fixed = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)
    gm = converted(nn.Sigmoid().eval(), on(aten.sigmoid.default, [None], fixed), data=None, example=DATA[0])
    q = next(n for n in gm.graph.nodes if n.target in QUANTIZE)
    assert q.args[1:] == (1 / 256, 0, 0, 255, torch.uint8)
    assert torch.allclose(gm(DATA[1]), DATA[1].sigmoid(), atol=1 / 512)


def test_float_zero_points_of_embedding_tables():
    scheme = torch.per_channel_affine_float_qparams
    spec = QuantizationSpec(torch.uint8, PerChannelMinMaxObserver, 0, 255, scheme, ch_axis=0)
    model = nn.Embedding(6, 4).eval()
    gm = converted(model, on(aten.embedding.default, [spec]), data=None, example=torch.arange(6))
    assert gm.get_buffer("weight_zero_point").dtype == torch.float32
    assert torch.allclose(gm(torch.arange(6)), model.weight, atol=0.02)


class WritesItself(MinMaxObserver):
    """An observer that is converted by its own method."""

    def convert(self, model, node):
        with model.graph.inserting_before(node):
            q = model.graph.call_function(qd.quantize_per_tensor.default, (node.args[0], 0.5, 0, -8, 7, torch.int8))
            dq = model.graph.call_function(qd.dequantize_per_tensor.default, (q, 0.5, 0, -8, 7, torch.int8))
        node.replace_all_uses_with(dq)
        model.graph.erase_node(node)


def test_an_observer_with_a_convert_method_writes_its_own_nodes():
    own = QuantizationSpec(torch.int8, WritesItself, -8, 7, torch.per_tensor_affine)
    gm = converted(Diamond().eval(), on(aten.relu.default, [], own))
    q = next(n for n in gm.graph.nodes if n.target in QUANTIZE)
    assert [u.target for u in q.users] == [qd.dequantize_per_tensor.default] * 3
    assert torch.equal(gm(DATA[1])[1], torch.cat([DATA[1].relu().div(0.5).round() * 0.5] * 2))
    assert [type(e).__name__ for e in record_of(gm).encodings] == ["CustomEncoding"]


def test_a_custom_convert_of_a_weight_is_folded():
    own = QuantizationSpec(torch.int8, WritesItself, -8, 7, torch.per_tensor_affine)
    gm = converted(linear(), products(weight=own, act=None, output=None))
    assert {n: t.dtype for n, t in gm.state_dict().items()} == {"bias": torch.float32, "weight_quantized": torch.int8}


# --------------------------------------------------------------------------------------------- twice, copied, not at
# all


@pytest.mark.parametrize("name", RECIPES)
def test_converted_twice_and_from_a_copy(name):
    prepared = prepare_pt2e(capture(linear(), DATA[0]), RECIPES[name])
    calibrate(prepared, DATA)
    first, second, third = convert_pt2e(prepared), convert_pt2e(prepared), convert_pt2e(copy.deepcopy(prepared))
    for other in (second, third):
        assert graph_text(other.graph) == graph_text(first.graph)
        assert other.state_dict().keys() == first.state_dict().keys()
        for key, value in first.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)
        assert torch.equal(other(DATA[1]), first(DATA[1]))


def test_more_calibration_after_conversion():
    prepared = prepare_pt2e(capture(linear(), DATA[0]), products())
    calibrate(prepared, DATA[:1])
    early = graph_text(convert_pt2e(prepared).graph)
    calibrate(prepared, DATA[1:])
    assert graph_text(convert_pt2e(prepared).graph) == graph_text(converted(linear(), products()).graph) != early


def test_what_was_never_prepared():
    captured = capture(linear(), DATA[0])
    with pytest.raises(Quant2eError, match="no observers: call prepare_pt2e"):
        convert_pt2e(captured)
    with pytest.raises(Quant2eError, match="takes what prepare_pt2e returned, not a Linear"):
        convert_pt2e(linear())
    assert convert_pt2e(prepare_pt2e(captured, NOTHING))


# ------------------------------------------------------------------------------------------------- calibration errors


class Branchy(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.left(x) + self.right(x * math.inf if self.blow_up else x)

    blow_up = False


def test_tensors_without_data_are_all_named():
    prepared = prepare_pt2e(capture(Branchy().eval(), DATA[0]), products())
    with pytest.raises(CalibrationError) as caught:
        convert_pt2e(prepared)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 tensors cannot be quantized:"
    assert "'x', read by 'linear' (aten.linear.default) in module 'left'" in lines[1]
    assert "the output of 'linear' (aten.linear.default) in module 'left'" in lines[2]
    assert "the output of 'linear_1' (aten.linear.default) in module 'right'" in lines[3]
    assert all("saw no data" in line and "test_convert.py" in line for line in lines[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("observer", [MinMaxObserver, HistogramObserver])
def test_data_that_is_not_finite(value, observer):
    spec = QuantizationSpec(torch.int8, observer, -128, 127, torch.per_tensor_affine)
    prepared = prepare_pt2e(capture(linear(), DATA[0]), products(act=spec, output=None))
    bad = DATA[0].clone()
    bad[0, 0] = value
    found = "NaN" if math.isnan(value) else r"\+inf"
    with pytest.raises(
        CalibrationError, match=rf"calibration batch 1 holds {found} in its input 'input': clean the data"
    ):
        calibrate(prepared, [DATA[0], bad])
    prepared(bad)
    with pytest.raises(CalibrationError, match=r"'input_1', read by 'linear'.*saw \d NaN and \d \+inf"):
        convert_pt2e(prepared)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    model = linear()
    with torch.no_grad():
        model.weight[0, 0] = value
    prepared = prepare_pt2e(capture(model, DATA[0]), products())
    calibrate(prepared, [DATA[0]])
    with pytest.raises(CalibrationError, match="'weight', read by 'linear'"):
        convert_pt2e(prepared)


def test_foreign_observers_without_data():
    from torchao.quantization.pt2e.observer import HistogramObserver as AOHistogram
    from torchao.quantization.pt2e.observer import MinMaxObserver as AOMinMax

    for observer in (AOMinMax, AOHistogram):
        spec = QuantizationSpec(torch.int8, observer, -128, 127, torch.per_tensor_affine)
        prepared = prepare_pt2e(capture(linear(), DATA[0]), products(act=spec, output=None))
        with pytest.raises(CalibrationError, match="'input_1', read by 'linear'.*saw no data"):
            convert_pt2e(prepared)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (QuantizationSpec(torch.int16, DYNAMIC.observer_or_fake_quant_ctr, is_dynamic=True), "know int8 and uint8"),
        (
            QuantizationSpec(
                torch.int8,
                DYNAMIC.observer_or_fake_quant_ctr,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
                is_dynamic=True,
            ),
            "scales found at run time are per tensor",
        ),
    ],
)
def test_dynamic_specs_that_no_op_can_run(spec, message):
    prepared = prepare_pt2e(capture(linear(), DATA[0]), products(act=spec, output=None))
    with pytest.raises(CalibrationError, match=message):
        convert_pt2e(prepared)


def test_all_zero_data_is_exact():
    zeros = torch.zeros(2, 4)
    gm = converted(linear(), products(output=None), [zeros])
    assert torch.allclose(gm(zeros), linear()(zeros))


def test_infinities_that_no_reader_takes_for_a_mask_are_left_out_of_the_range():
    class Logs(nn.Module):
        def forward(self, x):
            return x.relu().log().tanh() + x

    gm = converted(Logs().eval(), on(aten.tanh.default, [ACT]), [torch.tensor([[1.0, 2.0, -1.0]])])
    notes = record_of(gm).report.notes
    assert any("masked values (-inf or a mask's sentinel) left out of the range" in note for note in notes)


def tag_of(spec_of_x):
    """A linear marked as pattern "here", with its weight; the relu behind it is not annotated, though marked."""

    def note(node):
        node.meta[TAG] = "here" if node.target is aten.linear.default else "elsewhere"
        if node.target is not aten.linear.default:
            return None
        node.args[1].meta[TAG] = "here"
        return QuantizationAnnotation({node.args[0]: spec_of_x, node.args[1]: WEIGHT}, ACT)

    gm = converted(nn.Sequential(linear(), nn.ReLU()), Annotate(note))
    targets = (*QUANTIZE, *DEQUANTIZE, *CHOOSE_QPARAMS)
    return [(n.name, n.meta.get(TAG)) for n in gm.graph.nodes if n.target in targets or n.name.endswith("_quantized")]


def test_marks_of_a_pattern_reach_its_quantize_ops():
    assert tag_of(ACT) == [
        ("_0_weight_quantized", "here"),
        ("quantize_per_tensor_default", None),
        ("dequantize_per_channel_default", "here"),
        ("dequantize_per_tensor_default", "here"),
        ("quantize_per_tensor_default_1", "here"),
        ("dequantize_per_tensor_default_1", None),
    ]
    assert [mark for name, mark in tag_of(DYNAMIC)] == ["here"] * 6 + [None]


@pytest.mark.parametrize("symmetric", [False, True])
def test_histograms_are_searched_once_and_give_what_each_observer_says_alone(monkeypatch, symmetric):
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    histogram = QuantizationSpec(torch.int8, HistogramObserver, -128, 127, scheme)
    model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).eval()
    quantizer = products(act=histogram, output=histogram)
    prepared = prepare_pt2e(capture(model, DATA[0]), quantizer)
    calibrate(prepared, [torch.randn(2, 4) for _ in range(100)] + DATA)
    record = record_of(prepared)
    alone = {name: prepared.get_submodule(name).calculate_qparams() for name in record.observers if name}
    searched, search_all = [], range_search.mse_ranges

    def counted(states, grid):
        searched.extend(state.histogram for state in states)
        return search_all(states, grid)

    monkeypatch.setattr(range_search, "mse_ranges", counted)
    encodings = record_of(convert_pt2e(prepared)).encodings
    histograms = [m.histogram for m in prepared.modules() if isinstance(m, HistogramObserver)]
    assert len(histograms) >= 4
    assert sorted(map(id, searched)) == sorted(map(id, histograms))
    for name, encoding in zip(record.observers, encodings, strict=True):
        scale, zero_point = alone[name]
        assert torch.equal(
            torch.as_tensor(encoding.scale).flatten(), scale.flatten().to(torch.as_tensor(encoding.scale))
        )
        assert torch.equal(torch.as_tensor(encoding.zero_point).flatten(), zero_point.flatten().long())
