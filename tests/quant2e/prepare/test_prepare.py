"""Prepare and calibrate: what is changed (a copy), what is not (everything else), and what a quantizer may do."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from quant2e.annotation.plan import Edge, Output
from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import (
    ANNOTATION,
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    SharedQuantizationSpec,
)
from quant2e.calibration.calibrate import calibrate
from quant2e.convert.convert import convert_pt2e
from quant2e.errors import AnnotationError, CalibrationError, CaptureError, PlanError, Quant2eError
from quant2e.graph.captured.capture import capture
from quant2e.graph.printer import graph_text
from quant2e.observers.base import OBSERVER_PREFIX
from quant2e.observers.measuring import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from quant2e.prepare.prepare import prepare_pt2e
from quant2e.report.record import record_of
from quantizers import XNNPACKQuantizer
from tests.quant2e.annotators import ACT, DYNAMIC, NOTHING, WEIGHT, WEIGHT_PER_TENSOR, Annotate, aten, on, products


class Net(nn.Module):
    """Convolution and batch norm, linear, a mask, index arithmetic, a counter, keyword and nested inputs and
    outputs.
    """

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.table, self.linear = nn.Embedding(5, 4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x, ids, *, options):
        self.calls.add_(1)
        y = self.norm(self.conv(x)).relu().mean(-1) + self.table(ids + 1)
        self.last.copy_(y[0])
        y = y.masked_fill(options["mask"][0], float("-inf")).softmax(-1)
        return {"logits": self.linear(y), "shape": (y, ids * 2)}


def inputs(batch=2):
    mask = torch.tensor([False, True, False, False]).expand(batch, 4)
    return (torch.randn(batch, 3, 6), torch.arange(batch) % 4), {"options": {"mask": [mask]}}


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


@pytest.fixture
def model():
    net = Net()
    with torch.no_grad():
        net(*inputs()[0], **inputs()[1])  # statistics of the norm
    return net.eval()


class Snapshot:
    """Everything of a model, a captured graph and the random stream that must stay as it is."""

    def __init__(self, *modules):
        self.modules = modules
        self.before = self.look()

    def look(self):
        facts = [torch.get_rng_state().tolist(), torch.is_grad_enabled()]
        for module in self.modules:
            facts.append(
                {name: (id(t), t.tolist(), t._version) for name, t in module.state_dict(keep_vars=True).items()}
            )
            facts.append({name: (type(m).__name__, m.training, sorted(vars(m))) for name, m in module.named_modules()})
            if hasattr(module, "graph"):
                metas = [{k: id(v) for k, v in n.meta.items()} for n in module.graph.nodes]
                facts += [graph_text(module.graph), metas, module.code, dict(module.meta)]
        return facts

    def check(self):
        for now, then in zip(self.look(), self.before, strict=True):
            assert now == then


# -------------------------------------------------------------------------------------------------------- identities


def test_no_rules_leave_the_graph_bit_identical(model):
    args, kwargs = inputs()
    model.norm = nn.Identity()
    captured = capture(model, args, kwargs)
    prepared = prepare_pt2e(captured, NOTHING)
    assert graph_text(prepared.graph) == graph_text(captured.graph)
    converted = convert_pt2e(prepared)
    assert graph_text(converted.graph) == graph_text(captured.graph)
    for theirs, ours in zip(leaves(model(*args, **kwargs)), leaves(converted(*args, **kwargs)), strict=True):
        assert torch.equal(ours, theirs)


def everything(node):
    """Annotates whatever can be named: masks, indices, buffers, comparisons; only what is float may be quantized."""
    return QuantizationAnnotation(dict.fromkeys(node.all_input_nodes, ACT), ACT)


def test_integers_masks_and_written_buffers_are_never_observed(model):
    args, kwargs = inputs()
    prepared = prepare_pt2e(capture(model, args, kwargs), Annotate(everything))
    for node in prepared.graph.nodes:
        if node.op == "call_module":
            assert node.args[0].meta["val"].is_floating_point()
    notes = "\n".join(record_of(prepared).report.notes)
    for line in ("(calls -> add_)", "(last -> copy_)", "(ids -> add", "a int64 tensor", "a bool tensor"):
        assert line in notes
    calibrate(prepared, [Batch])
    converted = convert_pt2e(prepared)
    before = converted.get_buffer("calls").item()
    converted(*args, **kwargs)
    assert converted.get_buffer("calls").item() == before + 1


class _Batches:
    def __iter__(self):
        from quant2e.graph.captured.calls import Call

        yield Call(*inputs())


Batch = next(iter(_Batches()))


@pytest.mark.parametrize("quantizer", [products(), products(act=DYNAMIC, output=None), Annotate(everything)])
def test_the_callers_things_are_untouched(model, quantizer):
    args, kwargs = inputs()
    untouched = Snapshot(model)
    captured = capture(model, args, kwargs)
    untouched.check()
    untouched = Snapshot(model, captured)
    prepared = prepare_pt2e(captured, quantizer)
    untouched.check()
    calibrate(prepared, [Batch, Batch])
    untouched.check()
    converted = convert_pt2e(prepared)
    untouched.check()
    before = Snapshot(prepared)
    converted(*args, **kwargs)
    untouched.check()
    before.check()


def test_calibration_leaves_the_models_own_state(model):
    prepared = prepare_pt2e(capture(model, *inputs()), products())
    calls, last = prepared.get_buffer("calls").item(), prepared.get_buffer("last").clone()
    calibrate(prepared, [Batch, Batch])
    assert prepared.get_buffer("calls").item() == calls == model.calls.item()
    assert torch.equal(prepared.get_buffer("last"), last)
    with pytest.raises(CalibrationError, match="failed on calibration batch 1"):
        calibrate(prepared, [Batch, (torch.randn(2, 3, 6),)])
    assert prepared.get_buffer("calls").item() == calls


class Exploding(Quantizer):
    """Raises in one method; annotates in the others."""

    def __init__(self, stage, error=RuntimeError("boom")):
        self.stage, self.error = stage, error

    def _at(self, stage):
        if stage == self.stage:
            raise self.error

    def transform_for_annotation(self, model):
        for node in list(model.graph.nodes):
            if node.target is aten.relu.default:
                node.target = aten.relu6.default
        model.recompile()
        self._at("transform")
        return model

    def annotate(self, model):
        products().annotate(model)
        self._at("annotate")
        return model

    def validate(self, model):
        self._at("validate")

    def prepare_obs_or_fq_callback(self, model, observers):
        self._at("callback")
        for observer in observers.values():
            observer.register_forward_pre_hook(lambda *_: self._at("observer"))


@pytest.mark.parametrize("stage", ["transform", "annotate", "validate", "callback", "observer"])
def test_nothing_is_touched_when_a_stage_fails(model, stage):
    captured = capture(model, *inputs())
    untouched = Snapshot(model, captured)
    with pytest.raises(RuntimeError, match="boom"):
        prepare_pt2e(captured, Exploding(stage))
    untouched.check()


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (SharedQuantizationSpec("x"), PlanError),
        ("int8", AnnotationError),
        (QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_tensor_affine), AnnotationError),
    ],
)
def test_nothing_is_touched_when_an_annotation_is_wrong(model, spec, error):
    captured = capture(model, *inputs())
    untouched = Snapshot(model, captured)
    with pytest.raises(error):
        prepare_pt2e(captured, products(act=spec))
    untouched.check()


def test_nothing_is_touched_when_conversion_fails(model):
    captured = capture(model, *inputs())
    prepared = prepare_pt2e(captured, products())
    untouched = Snapshot(model, captured, prepared)
    with pytest.raises(CalibrationError, match="saw no data"):
        convert_pt2e(prepared)
    untouched.check()


# ---------------------------------------------------------------------------------------------------- what is refused


def test_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    captured = capture(model, torch.randn(2, 4))
    with pytest.raises(CaptureError, match=r"(?s)in training mode.*model.eval\(\) before capture.*dropout"):
        prepare_pt2e(captured, products())
    assert prepare_pt2e(captured.eval(), products())


def test_prepared_twice():
    prepared = prepare_pt2e(capture(nn.Linear(4, 4).eval(), torch.randn(2, 4)), products())
    with pytest.raises(Quant2eError, match="already prepared"):
        prepare_pt2e(prepared, products())


@pytest.mark.parametrize("quantizer", [None, "xnnpack", object(), Quantizer])
def test_what_is_no_quantizer(quantizer):
    captured = capture(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    with pytest.raises(AnnotationError, match="a quantizer has annotate"):
        prepare_pt2e(captured, quantizer)


def test_what_is_no_captured_model():
    with pytest.raises(CaptureError, match="call capture"):
        prepare_pt2e(nn.Linear(4, 4), products())


@pytest.mark.parametrize("data", [torch.randn(2, 4), "data", [], iter(()), None, 3])
def test_what_is_no_calibration_data(data):
    prepared = prepare_pt2e(capture(nn.Linear(4, 4).eval(), torch.randn(2, 4)), products())
    with pytest.raises(CalibrationError):
        calibrate(prepared, data)


def test_calibration_options():
    prepared = prepare_pt2e(capture(nn.Linear(4, 4).eval(), torch.randn(2, 4)), products())
    seen = []
    batches = iter([torch.full((2, 4), float(i)) for i in range(5)])
    calibrate(prepared, batches, num_batches=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert next(batches)[0, 0] == 2.0
    with pytest.raises(CalibrationError, match="num_batches=0"):
        calibrate(prepared, batches, num_batches=0)
    with pytest.raises(CalibrationError, match=r"batch 0 \(float32\[2, 3\]\)"):
        calibrate(prepared, [torch.zeros(2, 3)])


# ----------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("weight", [WEIGHT, WEIGHT_PER_TENSOR])
def test_weights_are_observed_at_prepare(weight):
    model = nn.Linear(4, 3).eval()
    prepared = prepare_pt2e(capture(model, torch.randn(2, 4)), products(act=None, weight=weight, output=None))
    observer = prepared.get_submodule(f"{OBSERVER_PREFIX}0")
    wanted = weight.observer_or_fake_quant_ctr(dtype=torch.int8, quant_min=-127, quant_max=127, qscheme=weight.qscheme)
    wanted(model.weight)
    for ours, theirs in zip(observer.calculate_qparams(), wanted.calculate_qparams(), strict=True):
        assert torch.equal(ours, theirs)
    total = observer.total
    calibrate(prepared, [torch.randn(2, 4)])
    assert observer.total == total == 12


def test_constants_computed_from_weights_are_observed():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.g = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 1))

        def forward(self, x):
            return nn.functional.linear(x, self.v * (self.g / self.v.norm(dim=1, keepdim=True)))

    prepared = prepare_pt2e(capture(Normed().eval(), torch.randn(2, 4)), products(act=DYNAMIC, output=None))
    converted = convert_pt2e(prepared)
    held = {name: t.dtype for name, t in converted.state_dict().items()}
    assert sorted(map(str, held.values())) == ["torch.float32", "torch.int64", "torch.int8"]


# ---------------------------------------------------------------------------------------------------------- callback


class Recalls(Annotate):
    """`products`, with a callback."""

    def __init__(self, callback, annotate=None):
        super().__init__(annotate or products()._annotate)
        self.prepare_obs_or_fq_callback = callback


def two_linears():
    return capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.randn(2, 4))


def points(prepared):
    return [tuple(map(str, group.points)) for group in record_of(prepared).plan.groups]


def test_the_callback_sees_every_point_in_pt2es_order():
    shown = []
    prepare_pt2e(two_linears(), Recalls(lambda gm, observers: shown.extend(observers)))
    names = [n.name if not isinstance(n, tuple) else tuple(p.name for p in n) for n in shown]
    assert names == [
        ("input_1", "linear"),
        ("_0_weight", "linear"),
        "linear",
        ("relu", "linear_1"),
        ("_2_weight", "linear_1"),
        "linear_1",
    ]


def test_a_callback_that_replaces_an_observer():
    def callback(gm, observers):
        for key in observers:
            if not isinstance(key, tuple):
                observers[key] = HistogramObserver(
                    dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine
                )

    prepared = prepare_pt2e(two_linears(), Recalls(callback))
    calibrate(prepared, [torch.randn(2, 4)])
    plan = record_of(prepared).plan
    assert str(plan.groups[plan.group_of(Output("linear"))].spec.dtype) == "torch.uint8"
    assert "u8[0, 255], per tensor affine, HistogramObserver: linear" in str(plan)
    text = graph_text(convert_pt2e(prepared).graph)
    assert text.count("u8)") == 4


def test_a_callback_that_merges_points():
    def callback(gm, observers):
        first = next(iter(observers.values()))
        for key in observers:
            if not isinstance(key, tuple):
                observers[key] = first

    prepared = prepare_pt2e(two_linears(), Recalls(callback))
    assert points(prepared)[0] == ("input_1 -> linear", "linear", "linear_1")
    calibrate(prepared, [torch.randn(2, 4)])
    encodings = record_of(convert_pt2e(prepared)).encodings
    assert len(encodings) == 4
    assert len({e for e in encodings if hasattr(e, "zero_point") and isinstance(e.scale, float)}) == 2


def test_a_callback_that_drops_and_adds_points():
    def callback(gm, observers):
        for key in [k for k in observers if not isinstance(k, tuple)]:
            del observers[key]
        relu = next(n for n in gm.graph.nodes if n.target is aten.relu.default)
        observers[relu] = MinMaxObserver(dtype=torch.uint8)

    prepared = prepare_pt2e(two_linears(), Recalls(callback))
    plan = record_of(prepared).plan
    assert plan.group_of(Output("linear")) is None
    assert str(plan.groups[plan.group_of(Output("relu"))].spec.dtype) == "torch.uint8"
    calibrate(prepared, [torch.randn(2, 4)])
    assert graph_text(convert_pt2e(prepared).graph).count("quantize_per_tensor.default(%relu") == 1


def test_the_report_says_what_the_callback_left():
    prepared = prepare_pt2e(two_linears(), Recalls(lambda gm, observers: observers.clear()))
    assert record_of(prepared).report.quantized_ops == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("linear", MinMaxObserver(), "neither a node of the graph"), (None, "int8", "an observer is an nn.Module")],
)
def test_a_callback_that_leaves_nonsense(key, value, message):
    def callback(gm, observers):
        observers[next(iter(observers)) if key is None else key] = value

    with pytest.raises(AnnotationError, match=message):
        prepare_pt2e(two_linears(), Recalls(callback))


def test_derived_parameters_follow_an_exchanged_source():
    def bias(node):
        if node.target is not aten.linear.default:
            return None
        x, w, b = node.args

        def derive(sources):
            (act, _), (weight, _) = (s.calculate_qparams() for s in sources)
            return act * weight, torch.zeros(1, dtype=torch.int32)

        derived = DerivedQuantizationSpec([(x, node), (w, node)], derive, torch.int32, -(2**31), 2**31 - 1)
        return QuantizationAnnotation({x: ACT, w: WEIGHT_PER_TENSOR, b: derived})

    def callback(gm, observers):
        key = next(k for k in observers if isinstance(k, tuple) and k[0].op == "placeholder")
        observers[key] = MinMaxObserver(dtype=torch.uint8)

    captured = capture(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    prepared = prepare_pt2e(captured, Recalls(callback, bias))
    calibrate(prepared, [torch.randn(2, 4)])
    record = record_of(convert_pt2e(prepared))
    by_point = {str(g.points[0]): e for g, e in zip(record.plan.groups, record.encodings, strict=True)}
    x, w, b = (by_point[f"{name} -> linear"] for name in ("input_1", "weight", "bias"))
    assert x.dtype == torch.uint8
    assert b.scale == pytest.approx(x.scale * w.scale, rel=1e-6)

    def drop(gm, observers):
        for k in [k for k in observers if isinstance(k, tuple) and k[0].op == "placeholder"]:
            del observers[k]

    with pytest.raises(PlanError, match=r"dropped the observer of \(input_1 -> linear\)"):
        prepare_pt2e(captured, Recalls(drop, bias))


# ------------------------------------------------------------------------------------------------- inputs and shapes


def test_dynamic_batch_kwargs_and_pytrees(model):
    args, kwargs = inputs(2)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {
        "x": {0: batch},
        "ids": {0: batch},
        "options": {"mask": [{0: batch}]},
    }
    captured = capture(model, args, kwargs, dynamic_shapes=shapes)
    prepared = prepare_pt2e(captured, products())
    for size in (2, 5, 9):
        out = prepared(*inputs(size)[0], **inputs(size)[1])
        assert out["logits"].shape == (size, 2)
        assert torch.equal(out["shape"][1], inputs(size)[0][1] * 2)
    converted = convert_pt2e(prepared)
    assert converted(*inputs(7)[0], **inputs(7)[1])["logits"].shape == (7, 2)
    assert "sym_size.int(%dequantize" not in graph_text(converted.graph)


def test_the_shape_of_a_quantized_tensor_is_read_without_dequantizing_it():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x)
            return y.view(y.shape[0] * 2, 2)

    captured = capture(Flat().eval(), torch.randn(3, 4), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    prepared = prepare_pt2e(captured, products())
    calibrate(prepared, [torch.randn(5, 4)])
    converted = convert_pt2e(prepared)
    assert converted(torch.randn(6, 4)).shape == (12, 2)
    for node in converted.graph.nodes:
        assert node.target is not aten.sym_size.int or "quantize" not in node.args[0].name


def test_keyword_operands_are_quantized_like_positional_ones():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return nn.functional.linear(x, weight=self.linear.weight, bias=self.linear.bias)

    captured = capture(Keyword().eval(), torch.randn(2, 4))
    linear = next(n for n in captured.graph.nodes if n.target is aten.linear.default)
    x, w, b = linear.args
    linear.args, linear.kwargs = (x,), {"weight": w, "bias": b}
    captured.recompile()
    prepared = prepare_pt2e(captured, on(aten.linear.default, [ACT, WEIGHT_PER_TENSOR]))
    calibrate(prepared, [torch.randn(2, 4)])
    converted = convert_pt2e(prepared)
    linear = next(n for n in converted.graph.nodes if n.target is aten.linear.default)
    assert {k: v.name.startswith("dequantize") for k, v in linear.kwargs.items()} == {"weight": True, "bias": False}
    assert linear.args[0].name.startswith("dequantize")


def test_an_exported_program_is_prepared_as_it_is():
    program = torch.export.export(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    text = str(program)
    prepared = prepare_pt2e(program, products())
    assert str(program) == text
    assert [n for n in prepared.graph.nodes if n.op == "call_module"]


def test_deepcopies_calibrate_apart():
    prepared = prepare_pt2e(two_linears(), products())
    twin = copy.deepcopy(prepared)
    calibrate(twin, [torch.randn(2, 4)])
    convert_pt2e(twin)
    with pytest.raises(CalibrationError):
        convert_pt2e(prepared)


def test_statistics_travel_in_the_state_dict():
    data = [torch.randn(2, 4)]
    prepared, other = prepare_pt2e(two_linears(), products()), prepare_pt2e(two_linears(), products())
    calibrate(prepared, data)
    missing = other.load_state_dict(OrderedDict(prepared.state_dict()))
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    x = torch.randn(2, 4)
    assert torch.equal(convert_pt2e(other)(x), convert_pt2e(prepared)(x))


def test_the_annotation_of_an_earlier_prepare_does_not_linger():
    captured = two_linears()
    prepare_pt2e(captured, products())
    assert not [n for n in captured.graph.nodes if ANNOTATION in n.meta]
    assert points(prepare_pt2e(captured, NOTHING)) == []
    assert record_of(prepare_pt2e(captured, products())).plan.group_of(Edge("relu", "linear_1")) is not None


class Reexporting(Quantizer):
    """Its transform hands back a graph of its own, as one that decomposes ops does."""

    def __init__(self, x):
        self.x = x

    def transform_for_annotation(self, model):
        return torch.export.export(model, (self.x,)).run_decompositions({}).module()

    def annotate(self, model):
        for node in model.graph.nodes:
            if node.target is aten.add.Tensor:
                node.meta[ANNOTATION] = QuantizationAnnotation(dict.fromkeys(node.args, ACT), ACT)
        return model

    def validate(self, model):
        pass


class Accumulates(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.ones(2, 4))

    def forward(self, x):
        self.total.add_(x)
        return self.total * 1


def test_a_transform_may_rebuild_the_graph():
    model, x = Accumulates(), torch.full((2, 4), 2.0)
    prepared = prepare_pt2e(capture(model, x), Reexporting(x))
    assert record_of(prepared).plan.group_of(Output("add")) is not None
    calibrate(prepared, [x])
    converted = convert_pt2e(prepared)
    assert torch.allclose(converted(x), torch.full((2, 4), 3.0), atol=0.02)
    assert torch.equal(model.total, torch.ones(2, 4))


def test_what_nothing_reads_is_gone_before_the_quantizer_looks():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            -y  # noqa: B018
            return y.relu()

    captured = capture(Model().eval(), (torch.randn(1, 4, 6, 6),))
    prepared = prepare_pt2e(captured, XNNPACKQuantizer().set_global("w8a8"))
    names = [node.name for node in prepared.graph.nodes]
    assert "neg" in {node.name for node in captured.graph.nodes}
    assert "neg" not in names
    assert prepared.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)[0].args[0].name == "conv2d"
