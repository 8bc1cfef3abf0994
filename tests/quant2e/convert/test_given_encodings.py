"""Encodings that are dumped, edited and applied again: exactly they come out."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import quant2e
from quant2e import AnnotationError, CalibrationError, Encodings, FileFormatError, QuantizationSpec
from quant2e.annotation.config import QuantizationConfig
from quant2e.convert.given_encodings import with_encodings
from quant2e.observers.encodings import encode
from quant2e.observers.given import give_encoding, give_integers
from quant2e.observers.measuring import PerChannelMinMaxObserver
from quant2e.report.encodings import encodings_of
from quant2e.report.record import record_of
from quantizers import ComposableQuantizer, EmbeddingQuantizer, Int16Quantizer, X86InductorQuantizer, XNNPACKQuantizer
from quantizers.conformance.capabilities import patterns_to_test
from quantizers.conformance.generate import SPECIAL_INPUTS, by_dice, random_programs, special_input
from tests.control_flow_models import SHAPES, Branches, captured, data


def assert_same(a, b, inputs):
    """Two converted graphs that are the same, bit for bit: nodes, integers, parameters, outputs."""
    assert quant2e.graph_text(a) == quant2e.graph_text(b)
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name
    for batch in inputs:
        with torch.no_grad():
            one, two = a(*batch), b(*batch)
        for x, y in zip(*(torch.utils._pytree.tree_leaves(out) for out in (one, two)), strict=True):
            assert torch.equal(x, y) or (x.isnan() == y.isnan()).all()


def again(result, tmp_path):
    result.encodings.to_file(tmp_path / "e.json")
    read = Encodings.from_file(tmp_path / "e.json")
    assert read == result.encodings
    return read


def check(model, example, make, batches, path, **options):
    """Quantize with data, write, read, and quantize without data."""
    options = {"min_sqnr_db": None, "allow_unquantized": True, **options}
    first = quant2e.quantize(model, example, make(), batches, **options)
    second = quant2e.quantize(model, example, make(), encodings=again(first, path), **options)
    assert_same(first.module, second.module, batches)
    assert second.encodings == first.encodings
    kinds = [[(v.op.name, v.kind) for v in result.report.verdicts] for result in (first, second)]
    assert kinds[0] == kinds[1]
    return first


QUANTIZERS = {
    "xnnpack": lambda: XNNPACKQuantizer().set_global("w8a8"),
    "xnnpack per tensor": lambda: XNNPACKQuantizer().set_global("w8a8-tensor"),
    "x86": lambda: X86InductorQuantizer().set_global("w8a8"),
    "int16": lambda: Int16Quantizer().set_global("a16w8"),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_generated_graphs(name, tmp_path):
    make = QUANTIZERS[name]
    known = patterns_to_test(make())
    programs = [*random_programs(known, 2, seed=3), special_input(SPECIAL_INPUTS[0], known, by_dice(0))]
    assert len(programs) > 1
    for program in filter(None, programs):
        check(program.module(0), program.batches(1)[0], make, program.batches(3), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZERS)
def test_many_generated_graphs(name, tmp_path):
    make = QUANTIZERS[name]
    known = patterns_to_test(make())
    special = [special_input(kind, known, by_dice(number)) for number, kind in enumerate(SPECIAL_INPUTS)]
    for program in filter(None, [*random_programs(known, 40, seed=7), *special]):
        check(program.module(0), program.batches(1)[0], make, program.batches(3), tmp_path)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(20, 32), nn.Linear(32, 64), nn.Linear(64, 5)

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.table(ids))))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


IDS = [(torch.randint(0, 20, (3, 4), generator=torch.Generator().manual_seed(seed)),) for seed in range(4)]

KINDS = {
    "dynamic": lambda: XNNPACKQuantizer().set_global("w8a8-dynamic"),
    "4 bits in groups": lambda: XNNPACKQuantizer().set_global("w4a8-dynamic-g32"),
    "x86 dynamic": lambda: X86InductorQuantizer().set_global("w8a8-dynamic"),
    "tables": lambda: EmbeddingQuantizer().set_global("w8-asym"),
    "tables in groups": lambda: EmbeddingQuantizer().set_global("w4-g32-asym"),
    "composed": lambda: ComposableQuantizer(
        [
            EmbeddingQuantizer().set_global("w4-g32"),
            XNNPACKQuantizer().set_module_name("up", "w8a8-dynamic"),
            X86InductorQuantizer().set_module_name("down", "w8a8"),
        ]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_encoding(kind, net, tmp_path):
    made = check(net, IDS[0], KINDS[kind], IDS, tmp_path)
    assert any(group.encoding != "float" for group in made.encodings.groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_floats(dtype, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype).eval()
    batches = [(torch.randn(2, 32).to(dtype),) for _ in range(3)]
    for make in (QUANTIZERS["x86"], KINDS["x86 dynamic"]):
        check(model, batches[0], make, batches, tmp_path)


@pytest.mark.parametrize(
    "kind", [Branches, *(pytest.param(k, marks=pytest.mark.slow) for k in SHAPES if k != Branches)]
)
def test_bodies_of_control_flow(kind, tmp_path):
    check(captured(kind), data(kind, 1)[0], QUANTIZERS["xnnpack"], data(kind), tmp_path)


@pytest.mark.slow
def test_a_body_that_never_ran_gets_what_is_given(tmp_path):
    kind = Branches
    make = QUANTIZERS["xnnpack"]
    everything = quant2e.quantize(captured(kind), data(kind, 1)[0], make(), data(kind), min_sqnr_db=None).encodings
    floats = tuple(replace(g, encoding="float") if "graph_0" in g.points[0] else g for g in everything.groups)
    given = replace(everything, groups=floats)
    made = quant2e.quantize(captured(kind), data(kind, 1)[0], make(), encodings=given, min_sqnr_db=None)
    inside = [v for v in made.report.verdicts if "graph_0" in v.op.name]
    assert inside
    assert not any(v.quantized for v in inside)
    assert "encodings that were given" in inside[0].reason


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchao", "executorch"])
def test_guests(library):
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    script = Path(__file__).with_name("guest_encodings.py")
    run = subprocess.run([sys.executable, str(script), library], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout.split()[-1]) > 5


def test_trained_models(net, tmp_path):
    make = lambda: XNNPACKQuantizer().set_global("w8a8-qat")
    prepared = quant2e.prepare_qat_pt2e(quant2e.capture(net.train(), IDS[0]), make())
    net.eval()
    for batch in IDS:
        prepared(*batch)
    prepared.eval()
    converted = quant2e.convert_pt2e(prepared)
    encodings = encodings_of(record_of(converted), "")
    for observer in (m for n, m in prepared.named_children() if n.startswith("activation_post_process_")):
        if hasattr(observer, "reset_min_max_vals"):
            observer.reset_min_max_vals()
    assert_same(converted, quant2e.convert_pt2e(prepared, encodings=encodings), IDS)


# ------------------------------------------------------------------------------------------------------------ edited


@pytest.fixture(scope="module")
def made(net):
    return quant2e.quantize(net, IDS[0], QUANTIZERS["xnnpack"](), IDS)


def prepared_net(net, calibrated=False):
    prepared = quant2e.prepare_pt2e(quant2e.capture(net, IDS[0]), QUANTIZERS["xnnpack"]())
    return quant2e.calibrate(prepared, IDS) if calibrated else prepared


def edited(encodings, point, **changes):
    """The encodings with other numbers for the group of one point."""
    assert any(point in group.points for group in encodings.groups), [g.points for g in encodings.groups]
    return replace(encodings, groups=tuple(replace(g, **changes) if point in g.points else g for g in encodings.groups))


def test_an_edited_scale_is_in_the_graph_as_it_was_written(net, made):
    given = edited(made.encodings, "relu", scale=(0.1,), zero_point=(-100,))  # 0.1 is no float32
    converted = quant2e.convert_pt2e(prepared_net(net), encodings=given)
    assert "quantize_per_tensor" in quant2e.graph_text(converted)
    arguments = [n.args[1:3] for n in converted.graph.nodes if "quantize_per_tensor" in n.name]
    assert (0.1, -100) in arguments
    # The bias behind it is on the grid of the new scale.
    weight = next(g for g in made.encodings.groups if g.points == ("down_weight -> linear_1",))
    bias = converted.state_dict()["down.bias_on_grid"]
    steps = bias.double() / (torch.tensor(0.1).double() * torch.tensor(weight.scale).double())
    assert torch.allclose(steps, steps.round(), atol=1e-3)


def test_edited_dtype_range_granularity_and_float(net, made):
    weight = next(g for g in made.encodings.groups if g.points == ("up_weight -> linear",))
    one = edited(
        made.encodings, "up_weight -> linear", encoding="per_tensor", axis=None, scale=(0.002,), zero_point=(0,)
    )
    text = quant2e.graph_text(quant2e.convert_pt2e(prepared_net(net), encodings=one))
    assert "dequantize_per_tensor.default(%up_weight_quantized" in text
    assert "up_weight_scale" not in text
    float_ = edited(made.encodings, "down_weight -> linear_1", encoding="float")
    with pytest.raises(AnnotationError, match=r"\(down_bias -> linear_1\): it derives its scale from points that have"):
        quant2e.convert_pt2e(prepared_net(net), encodings=float_)
    float_ = edited(float_, "down_bias -> linear_1", encoding="float")
    converted = quant2e.convert_pt2e(prepared_net(net), encodings=float_)
    assert quant2e.report_of(converted).of("linear_1").kind == "float"
    assert quant2e.report_of(converted).of("linear_1").reason.endswith("the encodings that were given say so")
    assert "down.weight_quantized" not in converted.state_dict()
    unsigned = edited(made.encodings, "relu", dtype="uint8", quant_min=0, quant_max=200, zero_point=(7,))
    nodes = quant2e.convert_pt2e(prepared_net(net), encodings=unsigned).graph.nodes
    assert any(n.args[3:] == (0, 200, torch.uint8) for n in nodes if n.op == "call_function")
    groups = edited(
        made.encodings,
        "up_weight -> linear",
        encoding="per_group",
        axis=None,
        group_size=16,
        scale=tuple(s * f for s in weight.scale for f in (1.0, 0.5)),
        zero_point=(0,) * 128,
    )
    groups = edited(groups, "up_bias -> linear", encoding="float")
    text = quant2e.graph_text(quant2e.convert_pt2e(prepared_net(net), encodings=groups))
    assert "dequantize_per_channel_group" in text


def test_static_made_dynamic(net, made):
    given = edited(made.encodings, "relu", encoding="dynamic", scale=(), zero_point=())
    given = edited(given, "down_bias -> linear_1", encoding="float")
    converted = quant2e.convert_pt2e(prepared_net(net), encodings=given)
    assert "choose_qparams" in quant2e.graph_text(converted)
    assert quant2e.report_of(converted).of("linear_1").kind == "dynamic"


def test_a_scale_that_leaves_nothing(net, made):
    with pytest.raises(CalibrationError, match="every value rounds to 0 at the scale that was given"):
        quant2e.convert_pt2e(
            prepared_net(net), encodings=edited(made.encodings, "up_weight -> linear", scale=(9.0,) * 64)
        )


def test_points_that_are_not_named_are_calibrated(net, made):
    few = replace(made.encodings, groups=tuple(g for g in made.encodings.groups if "relu" in g.points))
    with pytest.raises(CalibrationError, match="saw no data"):
        quant2e.convert_pt2e(prepared_net(net), encodings=few)
    converted = quant2e.convert_pt2e(prepared_net(net, calibrated=True), encodings=edited(few, "relu", scale=(0.25,)))
    assert any(n.args[1:2] == (0.25,) for n in converted.graph.nodes if n.op == "call_function")
    assert "1 of 7 groups of points have the numbers of encodings that were given" in quant2e.report_of(converted).notes


def test_a_bias_follows_an_activation_that_is_left_out(net, made):
    rest = replace(made.encodings, groups=tuple(g for g in made.encodings.groups if "relu" not in g.points))
    again = quant2e.quantize(net, IDS[0], QUANTIZERS["xnnpack"](), IDS, encodings=rest)
    assert again.encodings.groups == made.encodings.groups


def test_a_grid_that_no_longer_fits_is_told(net, made):
    fixed = edited(made.encodings, "down_bias -> linear_1", scale=(0.5,) * 5)
    converted = quant2e.convert_pt2e(prepared_net(net), encodings=fixed)
    assert torch.equal(converted.state_dict()["down.bias_on_grid"] % 0.5, torch.zeros(5))
    assert any("keeps the scale that was given" in note for note in quant2e.report_of(converted).notes)


def test_what_given_numbers_lose_is_told(net, made):
    tiny = edited(made.encodings, "relu", scale=(1e-4,))
    loud = quant2e.quantize(net, IDS[0], QUANTIZERS["xnnpack"](), IDS, encodings=tiny, min_sqnr_db=None)
    assert any("'relu'" in loss and "clipped" in loss for loss in loud.report.losses)
    assert "'relu'" not in {row.tensor for row in loud.report.ranges}


def test_nothing_of_the_prepared_model_changes(net, made):
    prepared = prepared_net(net, calibrated=True)
    before, code = quant2e.graph_text(prepared), prepared.code
    plain = quant2e.convert_pt2e(prepared)
    quant2e.convert_pt2e(prepared, encodings=edited(made.encodings, "relu", scale=(3.0,)))
    assert (quant2e.graph_text(prepared), prepared.code) == (before, code)
    assert_same(plain, quant2e.convert_pt2e(prepared), IDS)


def test_a_graph_with_given_encodings_is_saved_trained_and_copied(net, made, tmp_path):
    given = with_encodings(prepared_net(net), made.encodings)
    assert_same(made.module, quant2e.convert_pt2e(given), IDS)
    assert_same(made.module, quant2e.convert_pt2e(with_encodings(given, made.encodings)), IDS)
    quant2e.calibrate(given, IDS)
    assert_same(made.module, quant2e.convert_pt2e(given), IDS)


def test_integers_that_an_algorithm_chose_stay_with_their_numbers(net):
    prepared = prepared_net(net, calibrated=True)
    (call,) = [n for n in prepared.graph.nodes if n.op == "call_module" and n.args[0].name == "up_weight"]
    give_encoding(prepared, call.target, encode(prepared.get_submodule(call.target)))
    integers = torch.full((64, 32), 3, dtype=torch.int8)
    give_integers(prepared, call, integers)
    converted = quant2e.convert_pt2e(prepared)
    assert torch.equal(converted.state_dict()["up.weight_quantized"], integers)
    encodings = encodings_of(record_of(converted), "")
    assert_same(converted, quant2e.convert_pt2e(prepared, encodings=encodings), IDS)
    other = edited(encodings, "up_weight -> linear", scale=(0.01,) * 64)
    anew = quant2e.convert_pt2e(prepared, encodings=other).state_dict()["up.weight_quantized"]
    assert not torch.equal(anew, integers)


# ------------------------------------------------------------------------------------------------------------ refused

WRONG = [
    ({"points": ("reluu",)}, "there is no point (reluu); did you mean 'relu'"),
    ({"scale": (0.1, 0.2), "zero_point": (0, 0)}, "'per_tensor' has one scale and one integer zero point, not 2"),
    ({"zero_point": (300,)}, "(relu) and 1 that share with it: the zero point 300 is outside of the range"),
    ({"zero_point": (1.5,)}, "'per_tensor' has one scale and one integer zero point"),
    ({"quant_max": 400}, "the range [-128, 400] does not fit int8"),
    ({"dtype": "int9"}, "'int9' is no dtype of a quantized tensor; did you mean 'int8'"),
    ({"encoding": "per_channel"}, "'per_channel' needs the axis"),
    ({"encoding": "per_channel", "axis": 7}, "it has no axis 7"),
    ({"encoding": "per_channel", "axis": 2}, "1 scales for 64 channels along axis 2"),
    ({"encoding": "per_group", "group_size": 7}, "groups of 7 do not divide the rows"),
    ({"encoding": "custom"}, "has no observer here that writes its own nodes"),
    ({"encoding": "on_grid", "scale": (), "zero_point": ()}, "derives none from other points here"),
    ({"encoding": "dynamic"}, "(down_bias -> linear_1): it derives its scale from points that have none"),
    ({"encoding": "float"}, "make it 'float' as well"),
    ({"scale": (1e-300,)}, "the scale 1e-300 is no normal float32 number"),
    ({"scale": (1e300,)}, "the scale 1e+300 is no normal float32 number"),
    ({"encoding": "dynamic", "dtype": "int16"}, "dynamic quantization to torch.int16"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_edits(net, made, changes, message):
    given = edited(made.encodings, "relu", **changes)
    for wrong in (lambda: quant2e.convert_pt2e(prepared_net(net), encodings=given),):
        with pytest.raises(AnnotationError) as refused:
            wrong()
        assert message in str(refused.value), refused.value


def test_encodings_of_another_model(net, made):
    other = quant2e.quantize(
        nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),), QUANTIZERS["xnnpack"](), [(torch.randn(2, 4),)]
    )
    with pytest.raises(AnnotationError, match=r"encodings of another model: it has none of their 4 points, \(input_1 "):
        quant2e.quantize(net, IDS[0], QUANTIZERS["xnnpack"](), encodings=other.encodings)
    with pytest.raises(
        quant2e.Quant2eError, match=r"encodings is a dict: give an Encodings, as QuantizedModel.encodings"
    ):
        quant2e.convert_pt2e(prepared_net(net), encodings=made.encodings.as_dict())


def test_points_with_two_entries_and_half_a_group(net, made):
    twice = replace(made.encodings, groups=(*made.encodings.groups, made.encodings.groups[0]))
    with pytest.raises(AnnotationError, match="has two entries"):
        quant2e.convert_pt2e(prepared_net(net), encodings=twice)
    (group,) = [g for g in made.encodings.groups if "relu" in g.points]
    half = edited(made.encodings, "relu", points=group.points[:1])
    with pytest.raises(AnnotationError, match="name all of them or none"):
        quant2e.convert_pt2e(prepared_net(net), encodings=half)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"scale": [', '"scale": [NaN, ', "NaN is no number of JSON"),
        ('"scale": [', '"scale": [-1.0, ', "a scale is not a positive, finite number"),
        ('"encoding": "per_tensor"', '"encoding": "per_tensr"', "'per_tensr' is none of the encodings"),
        ('"quant_max"', '"quant_maxx"', "quant_maxx"),
        ('"dtype": "int8",', '"dtype": "int8", "dtype": "int8",', "stands twice"),
        ('"scale": [', '"scale": ["a", ', "must be a number"),
    ],
)
def test_wrong_files(made, tmp_path, old, new, message):
    made.encodings.to_file(tmp_path / "e.json")
    text = (tmp_path / "e.json").read_text()
    assert old in text
    (tmp_path / "e.json").write_text(text.replace(old, new, 1))
    with pytest.raises(FileFormatError, match=message):
        Encodings.from_file(tmp_path / "e.json")


def test_a_short_entry_is_enough(net, tmp_path):
    (tmp_path / "e.json").write_text(
        json.dumps(
            {
                "format": 1,
                "quantizer": "by hand",
                "groups": [
                    {"points": ["down_weight -> linear_1"], "encoding": "float"},
                    {"points": ["down_bias -> linear_1"], "encoding": "float"},
                ],
            }
        )
    )
    given = Encodings.from_file(tmp_path / "e.json")
    made = quant2e.quantize(net, IDS[0], QUANTIZERS["xnnpack"](), IDS, encodings=given)
    assert made.report.of("linear_1").kind == "float"


def test_an_author_s_spec_of_float_zero_points(tmp_path):
    spec = QuantizationSpec(
        torch.uint8, PerChannelMinMaxObserver.with_args(), 0, 255, torch.per_channel_affine_float_qparams, 0
    )
    make = lambda: EmbeddingQuantizer().set_global(QuantizationConfig(None, None, spec, None))
    torch.manual_seed(1)
    model = Net().eval()
    made = check(model, IDS[0], make, IDS, tmp_path)
    assert type(made.encodings.groups[0].zero_point[0]) is float
