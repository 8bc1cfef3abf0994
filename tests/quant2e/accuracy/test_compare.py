"""Comparison: errors lie where they were made, on generated graphs too, and what is compared is said."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quant2e
from quant2e.accuracy.compare import compare
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE
from quant2e.ranges.sqnr import sqnr_db
from quantizers.conformance.capabilities import patterns_to_test
from quantizers.conformance.generate import by_dice, composition
from quantizers.x86 import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config


class Net(nn.Module):
    """A residual block with a batch norm to fold, pooling, and a head whose softmax stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x)))
        z = F.max_pool2d(self.second(y) + y, 4)
        return self.head(z.flatten(1)).softmax(-1)


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model.norm.running_mean.normal_()
    model.norm.weight.data.uniform_(0.5, 2.0)
    return model.eval()


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def xnnpack(**settings: bool) -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**settings))


@pytest.fixture(scope="module")
def quantized() -> quant2e.QuantizedModel:
    return quant2e.quantize(net(), (batches()[0],), xnnpack(), batches(10))


@pytest.fixture(scope="module")
def comparison(quantized):
    return compare(net(), quantized, batches())


def test_every_op_and_every_input_has_a_row(comparison):
    assert {row.op for row in comparison.rows} == {
        "x", "conv2d", "relu", "conv2d_1", "add", "max_pool2d", "flatten", "linear", "softmax",
    }  # fmt: skip
    assert comparison.batches == 4
    assert comparison.notes == ()


def test_worst_first_by_the_error_that_an_op_makes_itself(comparison):
    found = [row.local_sqnr_db for row in comparison.rows]
    assert found == sorted(found)
    assert math.isfinite(found[0])


def test_what_only_moves_values_or_stays_float_makes_no_error_and_inherits_some(comparison):
    for op in ("max_pool2d", "flatten", "softmax"):
        assert comparison.of(op).local_sqnr_db == math.inf
        assert math.isfinite(comparison.of(op).sqnr_db)


def test_an_input_has_the_error_of_its_rounding(comparison, quantized):
    node = next(
        node for node in quantized.module.graph.nodes if node.target in QUANTIZE and node.args[0].op == "placeholder"
    )
    _, scale, zero_point, low, high, _ = node.args
    x = torch.cat(batches())
    rounded = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    expected = sqnr_db(float(x.double().square().sum()), float((rounded - x).double().square().sum()))
    row = comparison.of("x")
    assert row.local_sqnr_db == row.activation_sqnr_db == pytest.approx(expected)
    assert row.weight_sqnr_db == math.inf


def test_weights_and_activations_are_told_apart(comparison):
    """A convolution with a relu behind it is rounded behind the relu: its error is that of its weights."""
    conv, relu, linear = map(comparison.of, ("conv2d", "relu", "linear"))
    assert conv.weight_sqnr_db == conv.local_sqnr_db < math.inf == conv.activation_sqnr_db
    assert relu.activation_sqnr_db == relu.local_sqnr_db < math.inf == relu.weight_sqnr_db
    added = 10 ** (-linear.weight_sqnr_db / 10) + 10 ** (-linear.activation_sqnr_db / 10)
    assert linear.local_sqnr_db == pytest.approx(sqnr_db(1.0, added), abs=0.5)


def test_a_dynamic_scale_belongs_to_the_op_that_asked_for_it():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    data = [torch.randn(4, 16) for _ in range(2)]
    found = compare(model, quant2e.quantize(model, (data[0],), xnnpack(is_dynamic=True, is_per_channel=True)), data)
    assert {row.op for row in found.rows} == {"linear", "linear_1"}
    assert all(row.activation_sqnr_db < math.inf and row.weight_sqnr_db < math.inf for row in found.rows)


def test_outputs_are_compared_as_the_models_return_them(comparison, quantized):
    model, signal, noise = net(), 0.0, 0.0
    for x in batches():
        exact, got = model(x).detach().double(), quantized(x).double()
        signal, noise = signal + float(exact.square().sum()), noise + float((got - exact).square().sum())
    assert comparison.outputs[0].sqnr_db == pytest.approx(sqnr_db(signal, noise), abs=1e-3)
    assert comparison.outputs[0].cosine == pytest.approx(1.0, abs=1e-3)


def planted(quantized, op: str, strength: float) -> quant2e.QuantizedModel:
    """The same model with noise on the result of one op, in proportion to it."""
    gm = copy_graph(quantized.module)
    node = next(node for node in gm.graph.nodes if node.name == op)
    compute = node.target

    def noisy(*args, **kwargs):
        result = compute(*args, **kwargs)
        noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(3))
        return result + noise * (result.square().mean().sqrt() or 1.0) * strength

    node.target = noisy
    gm.recompile()
    return quant2e.QuantizedModel(
        module=gm, report=quantized.report, encodings=quantized.encodings, example_inputs=quantized.example_inputs
    )


@pytest.mark.parametrize("op", ["conv2d", "relu", "conv2d_1", "add", "max_pool2d", "linear"])
def test_planted_noise_is_blamed_on_its_op(quantized, op):
    worst = compare(net(), planted(quantized, op, 0.5), batches()).rows[0]
    assert worst.op == op
    assert worst.local_sqnr_db < 10.0


def test_planted_noise_is_blamed_on_its_op_on_generated_graphs():
    known = patterns_to_test(xnnpack())
    looked_at = 0
    for seed in range(60):
        if looked_at == 20:
            break
        program = composition(known, by_dice(seed))
        if program is None:
            continue
        model, data = program.module(seed), program.batches(3, seed)
        try:
            result = quant2e.quantize(model, data[0], xnnpack(), data, min_sqnr_db=None, allow_unquantized=True)
        except Quant2eError:
            continue
        rows = [row for row in compare(model, result, data).rows if row.target != "input" and row.local_sqnr_db > 20.0]
        if not rows:
            continue
        op = rows[seed % len(rows)].op
        found = compare(model, planted(result, op, 1.0), data)
        assert found.rows[0].op == op, (seed, program, found)
        looked_at += 1
    assert looked_at == 20


def test_a_weight_with_one_bad_scale_is_blamed_on_weights(quantized):
    gm = copy_graph(quantized.module)
    for node in gm.graph.nodes:
        if node.target in DEQUANTIZE and str(node.args[0].target) == "second.weight_quantized":
            node.update_arg(1, node.args[1] * 1.5)
    gm.recompile()
    worst = compare(net(), gm, batches()).rows[0]
    assert (worst.op, worst.module) == ("conv2d_1", "second")
    assert worst.weight_sqnr_db < 10.0 < worst.activation_sqnr_db


def test_grouped_by_module_and_by_line(comparison):
    modules = {group.name: group for group in comparison.by_module()}
    assert {"first", "second", "head"} <= modules.keys()
    assert modules["second"].local_sqnr_db == pytest.approx(comparison.of("conv2d_1").local_sqnr_db)
    lines = {group.name for group in comparison.by_source()}
    assert any("self.second(y) + y" in line for line in lines), lines


def test_saved_and_loaded(quantized, comparison, tmp_path):
    quantized.save(tmp_path / "model.pt2")
    loaded = compare(net(), quant2e.load(tmp_path / "model.pt2"), batches())
    assert {row.op: row.measures for row in loaded.rows} == {row.op: row.measures for row in comparison.rows}


def test_the_prepared_graph_may_stand_for_the_float_model():
    captured = quant2e.capture(net(), (batches()[0],))
    prepared = quant2e.prepare_pt2e(captured, xnnpack())
    quant2e.calibrate(prepared, batches(8))
    converted = quant2e.convert_pt2e(prepared)
    by_graph, by_model = compare(prepared, converted, batches()), compare(net(), converted, batches())
    for row in by_graph.rows:
        assert row.local_sqnr_db == pytest.approx(by_model.of(row.op).local_sqnr_db, abs=0.1)


def test_a_prepared_graph_observes_nothing_of_it():
    prepared = quant2e.prepare_pt2e(quant2e.capture(net(), (batches()[0],)), xnnpack())
    quant2e.calibrate(prepared, batches(8))
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    compare(prepared, quant2e.convert_pt2e(prepared), [batch * 100.0 for batch in batches()])
    assert all(torch.equal(value, before[key]) for key, value in prepared.state_dict().items())


def test_a_model_in_training():
    captured = quant2e.capture(net(), (batches()[0],))
    prepared = quant2e.prepare_qat_pt2e(captured, xnnpack(is_qat=True))
    quant2e.calibrate(prepared, batches(8))
    prepared.eval()
    trained, converted = (compare(net(), model, batches()) for model in (prepared, quant2e.convert_pt2e(prepared)))
    assert trained.outputs[0].sqnr_db == pytest.approx(converted.outputs[0].sqnr_db, abs=0.5)
    for op in ("x", "relu", "add", "linear"):
        assert trained.of(op).sqnr_db == pytest.approx(converted.of(op).sqnr_db, abs=1.0)


def test_sizes_may_vary():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU()).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    data = [torch.randn(n, 16) for n in (4, 7, 3)]
    result = quant2e.quantize(model, (data[0],), xnnpack(), data, dynamic_shapes=({0: batch},))
    assert compare(model, result, data).batches == 3


@pytest.mark.parametrize("io", [True, False], ids=["integers outside", "integers inside"])
def test_outputs_only_and_said(io):
    result = quant2e.quantize(
        net(), (batches()[0],), xnnpack(), batches(8), int8_io=io, use_reference_representation=not io
    )
    found = compare(net(), result, batches())
    assert found.rows == ()
    assert "integers: outputs are compared" in found.notes[0]
    assert found.outputs[0].sqnr_db > 20.0


def test_a_lowered_program_is_called(quantized):
    found = compare(net(), quantized.__call__, batches())
    assert found.rows == ()
    assert found.outputs[0].sqnr_db == pytest.approx(compare(net(), quantized, batches()).outputs[0].sqnr_db)


def test_masked_scores_do_not_count():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scores(x).masked_fill(torch.ones(8, 8).triu(1).bool(), -math.inf).softmax(-1)

    model, data = Masked().eval(), [torch.randn(8, 8) for _ in range(4)]
    config = get_default_x86_inductor_quantization_config()
    found = compare(model, quant2e.quantize(model, (data[0],), X86InductorQuantizer().set_global(config), data), data)
    assert all(row.sqnr_db > 20.0 for row in found.rows)


def test_text(comparison):
    text = str(comparison)
    assert text.count("dB by itself") == len(comparison.rows)
    assert "output 0: " in repr(comparison)
    assert "<table>" in comparison._repr_html_()
    assert comparison.as_dict()["rows"][0]["op"] == comparison.rows[0].op


class Unlike(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x).mean((2, 3))


def test_two_other_models_are_refused(quantized):
    with pytest.raises(Quant2eError, match=r"output 0 is of shape \[4, 10\], and a tensor of shape \[4, 3\] in float"):
        compare(Unlike(), quantized, batches())


@pytest.mark.parametrize(
    "result", [None, torch.zeros(4, 3), torch.zeros(4, 10).numpy()], ids=["none", "shape", "array"]
)
def test_outputs_of_another_kind_are_refused(result):
    with pytest.raises(Quant2eError, match="output 0 is "):
        compare(net(), lambda x: result, batches())


def test_a_lowered_program_with_sizes_that_vary():
    model = nn.Linear(8, 4).eval()
    found = compare(model, lambda x: model(x) + 1e-3, [torch.randn(4, 8), torch.randn(7, 8)])
    assert found.batches == 2
    assert math.isfinite(found.outputs[0].sqnr_db)


def test_what_is_not_finite_counts_as_in_quantize():
    """A mask that a program turns into numbers is an error without bound."""
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    masked = [torch.cat([torch.full((1, 8), -math.inf), torch.randn(3, 8)])]
    found = compare(lambda_module(model), lambda x: lambda_module(model)(x).nan_to_num(neginf=-1e4), masked)
    assert found.outputs[0].sqnr_db == -math.inf


def lambda_module(model: nn.Module) -> nn.Module:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x[:, :4] == -math.inf, -math.inf, model(x.clamp(-10.0, 10.0)))

    return Masked()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


def test_a_recurrent_layer_has_a_row_of_its_own():
    torch.manual_seed(0)
    model, data = Recurrent().eval(), [torch.randn(2, 5, 8) for _ in range(3)]
    float_head = XNNPACKQuantizer().set_global("w8a8-dynamic").set_module_name("head", None)
    rows = {row.module: row for row in compare(model, quant2e.quantize(model, (data[0],), float_head, data), data).rows}
    assert math.isfinite(rows["lstm"].local_sqnr_db)
    assert rows["head"].local_sqnr_db == math.inf
    assert rows["head"].advice.startswith("the error is that of what it reads")


def test_a_recurrent_layer_has_weights_and_activations_told_apart():
    """A column that its weights do not read owns the range of the input: all the error is that of activations."""
    torch.manual_seed(0)
    model, data = nn.LSTM(6, 8, bias=False).eval(), [torch.randn(5, 10, 6) for _ in range(4)]
    model.weight_ih_l0.data[:, 0] = 0.0
    for x in data:
        x[..., 0] = 300.0
    dynamic = XNNPACKQuantizer().set_global("w8a8-dynamic")
    row = compare(model, quant2e.quantize(model, (data[0],), dynamic, data, min_sqnr_db=None), data).rows[0]
    assert row.activation_sqnr_db < 15.0
    assert row.weight_sqnr_db > 30.0


class Written(nn.Module):
    """A view of an activation is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y[:, :4].mul_(3.0)
        return self.second(y)


def test_tensors_that_are_written_to_are_left_out_and_said():
    model, data = Written().eval(), [torch.randn(4, 8) for _ in range(6)]
    found = compare(model, quant2e.quantize(model, (data[0],), xnnpack(), data), data)
    assert "second" not in {row.module for row in found.rows}
    assert "tensors that the model writes to: not compared" in found.notes[0]
    assert found.outputs[0].sqnr_db > 20.0


def test_what_is_written_in_place_where_nobody_sees_it_is_compared():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(self.first(x), inplace=True)
            z = self.second(y)
            z += y
            return z

    torch.manual_seed(0)
    model, data = Residual().eval(), [torch.randn(4, 8) for _ in range(6)]
    found = compare(model, quant2e.quantize(model, (data[0],), xnnpack(), data), data)
    assert found.notes == ()
    assert {"relu_", "linear_1", "add_"} <= {row.op for row in found.rows}
    assert all(row.local_sqnr_db > 25.0 for row in found.rows)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return torch.cond(x.sum() > 0, self.second, lambda y: torch.relu(self.second(y)), (y,))


def test_a_prepared_graph_with_branches_observes_nothing_of_it():
    torch.manual_seed(0)
    data = [torch.randn(4, 8).abs() * (1.0 if i % 2 else -1.0) for i in range(6)]
    prepared = quant2e.prepare_pt2e(quant2e.capture(Branching().eval(), (data[0],)), xnnpack())
    quant2e.calibrate(prepared, data)
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    found = compare(prepared, quant2e.convert_pt2e(prepared), [x * 100.0 for x in data])
    assert all(torch.equal(value, before[key]) for key, value in prepared.state_dict().items())
    assert any("compared as one op" in note for note in found.notes)


def test_the_first_batch_may_be_a_single_sample():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = [torch.randn(n, 8) for n in (1, 4, 7)]
    batch = torch.export.Dim("batch", min=1, max=32)
    result = quant2e.quantize(model, (data[1],), xnnpack(), data, dynamic_shapes=({0: batch},))
    assert compare(model, result, data).batches == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_data_of_another_dtype_is_refused(quantized, dtype):
    with pytest.raises(Quant2eError, match="has dtype"):
        compare(net(), quantized, [batches()[0].to(dtype)])


def test_a_program_that_fails_is_named():
    with pytest.raises(Quant2eError, match="the quantized model, on batch 0, failed: RuntimeError"):
        compare(nn.Linear(8, 8), nn.Linear(3, 3), [torch.randn(4, 8)])


def test_no_data_and_no_model_are_refused(quantized):
    with pytest.raises(CalibrationError, match="at least one batch"):
        compare(net(), quantized, [])
    with pytest.raises(CalibrationError, match="num_batches"):
        compare(net(), quantized, batches(), num_batches=0)
    with pytest.raises(Quant2eError, match="not a int"):
        compare(net(), 7, batches())


def test_the_models_are_left_as_they_are():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1.0)
            return self.linear(x) + self.count.clamp(max=1.0)

    model, data = Counting().eval(), [torch.randn(4, 8) for _ in range(3)]
    result = quant2e.quantize(model, (data[0],), xnnpack(), data)
    found = compare(model, result, data)
    assert model.count.item() == 0.0
    assert all(float(value) == 0.0 for name, value in result.module.named_buffers() if name.endswith("count"))
    assert found.outputs[0].sqnr_db > 20.0
