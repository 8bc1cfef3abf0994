"""Quantization-aware training: what is trained is what is deployed, for every pair of op and batch norm."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import quant2e
from quant2e import (
    CalibrationError,
    CaptureError,
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    LearnableFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    Quant2eError,
    QuantizationConfig,
    QuantizationSpec,
    capture,
    convert_pt2e,
    disable_observer,
    freeze_batch_norm,
    prepare_pt2e,
    prepare_qat_pt2e,
)
from quant2e.annotation.granularity import PerToken
from quant2e.observers.dynamic_fake_quant import DynamicFakeQuantize
from quant2e.observers.encodings import encode
from quant2e.passes.train_batch_norm import FUSED
from quant2e.report.record import record_of
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_embedding_quantization_config,
    get_symmetric_quantization_config,
)

aten = torch.ops.aten


def quantizer(**options):
    config = get_symmetric_quantization_config(**{"is_per_channel": True, "is_qat": True, **options})
    return XNNPACKQuantizer().set_global(config)


class Pair(nn.Module):
    """An op, its batch norm, and an activation or none."""

    def __init__(self, op, norm, act=None):
        super().__init__()
        self.op, self.norm, self.act = op, norm, act

    def forward(self, x):
        x = self.norm(self.op(x))
        return x if self.act is None else self.act(x)


class Residual(nn.Module):
    """What networks are made of: conv + norm + relu, a residual sum, dropout, a head."""

    def __init__(self):
        super().__init__()
        self.first = Pair(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.second = Pair(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.first(x)
        x = torch.relu(self.second(x) + x)
        return self.head(self.drop(x.mean((2, 3), keepdim=True).flatten(1)))


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def train(prepared, batches, lr=0.02):
    optimizer = torch.optim.SGD(prepared.parameters(), lr=lr)
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = (prepared(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def range_tolerance(prepared):
    prepared.eval()
    prepared.apply(disable_observer)
    return prepared


PAIRS = {
    "conv1d": (lambda: Pair(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), (4, 3, 9)),
    "conv1d, no bias, relu": (lambda: Pair(nn.Conv1d(3, 6, 3, bias=False), nn.BatchNorm1d(6), nn.ReLU()), (4, 3, 9)),
    "conv2d": (lambda: Pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), (4, 3, 9, 9)),
    "conv2d, no bias, relu6": (
        lambda: Pair(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True)),
        (4, 3, 9, 9),
    ),
    "conv2d, hardtanh, stride": (
        lambda: Pair(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6, eps=1e-2), nn.Hardtanh()),
        (4, 3, 9, 9),
    ),
    "depthwise": (lambda: Pair(nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU()), (4, 6, 9, 9)),
    "padding same": (lambda: Pair(nn.Conv2d(3, 6, 3, padding="same"), nn.BatchNorm2d(6)), (4, 3, 9, 9)),
    "norm without scale": (lambda: Pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)), (4, 3, 9, 9)),
    "transposed": (lambda: Pair(nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), (4, 3, 5, 5)),
    "linear": (lambda: Pair(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU()), (8, 5)),
    "linear, no bias": (lambda: Pair(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6)), (8, 5)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("is_per_channel", [False, True])
def test_what_is_trained_is_what_is_converted(name, is_per_channel):
    make, shape = PAIRS[name]
    torch.manual_seed(0)
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    prepared = prepare_qat_pt2e(capture(model, (data(*shape),)), quantizer(is_per_channel=is_per_channel))
    (fused,) = prepared.meta[FUSED]
    losses = train(prepared, [data(*shape, seed=i) for i in range(1, 5)])
    assert losses[-1] != losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    range_tolerance(prepared)
    x = data(*shape, seed=9)
    with torch.no_grad():
        expected, converted = prepared(x), convert_pt2e(prepared)
        y = converted(x)
    assert not any(node.target is aten.batch_norm.default for node in converted.graph.nodes)
    output = prepared.graph.output_node().all_input_nodes[0]
    step = encode(prepared.get_submodule(str(output.target))).scale
    steps = (y - expected).abs() / step
    # Rounding the folded bias to the accumulator, and the order of float operations, may move a value across a
    # boundary.
    assert steps.max() < 1.01
    assert (steps > 0.01).float().mean() < 0.02
    if is_per_channel:
        weight = next(n for n in converted.graph.nodes if "dequantize_per_channel" in str(n.target))
        assert weight.args[3] == (1 if name == "transposed" else 0)
    assert record_of(converted).report.of(fused.norm).kind == "folded"


@pytest.mark.parametrize("groups", [1, 3])
def test_a_transposed_weight_is_scaled_group_by_group(groups):
    # XNNPACK takes transposed convolutions with groups per tensor only.
    model = Pair(nn.ConvTranspose2d(3, 6, 3, groups=groups), nn.BatchNorm2d(6)).train()
    model.norm.weight.data.uniform_(0.5, 2)
    model.norm.running_var.uniform_(0.5, 2)
    x = data(2, 3, 5, 5)
    prepared = prepare_qat_pt2e(capture(model, (x,)), quantizer(is_per_channel=False))
    assert len(prepared.meta[FUSED]) == 1
    prepared.apply(quant2e.disable_fake_quant)
    torch.testing.assert_close(prepared(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_the_rewrite_keeps_the_float_result(name):
    make, shape = PAIRS[name]
    torch.manual_seed(0)
    model = make().train()
    train_like, x = copy.deepcopy(model), data(*shape)
    prepared = prepare_qat_pt2e(capture(model, (x,)), quantizer())
    prepared.apply(quant2e.disable_fake_quant)
    for i in range(3):
        torch.testing.assert_close(prepared(x + i), train_like(x + i), rtol=1e-4, atol=1e-5)
    # Statistics move as those of the eager norm, and are used in evaluation.
    torch.testing.assert_close(prepared.get_buffer("norm.running_var"), train_like.norm.running_var)
    assert prepared.get_buffer("norm.num_batches_tracked") == 3
    prepared.eval()
    train_like.eval()
    torch.testing.assert_close(prepared(x), train_like(x), rtol=1e-4, atol=1e-5)


def test_a_captured_model_in_evaluation_is_taken_too():
    torch.manual_seed(0)
    model, x = Residual(), data(4, 3, 8, 8)
    prepared = prepare_qat_pt2e(capture(model.eval(), (x,)), quantizer())
    assert len(prepared.meta[FUSED]) == 2
    assert not prepared.training
    prepared.train()
    train(prepared, [x, x])
    with torch.no_grad():
        assert torch.equal(convert_pt2e(range_tolerance(prepared))(x), convert_pt2e(prepared)(x))


def test_norms_that_start_at_zero_train():
    # ResNets initialise the last norm of a branch so; dividing by its scale would give NaN.
    torch.manual_seed(0)
    model, x = Residual(), data(4, 3, 8, 8)
    model.second.norm.weight.data.zero_()
    model.first.norm.weight.data[2] = 0
    prepared = prepare_qat_pt2e(capture(model.train(), (x,)), quantizer())
    losses = train(prepared, [x] * 4)
    assert all(map(math.isfinite, losses))
    assert (prepared.get_parameter("second.norm.weight") != 0).sum() >= 4
    model.drop.p = 0.0
    again = prepare_qat_pt2e(capture(model.train(), (x,)), quantizer())
    with torch.no_grad():
        again(x)
        y, converted = range_tolerance(again)(x), convert_pt2e(again)
        torch.testing.assert_close(converted(x), y, rtol=0, atol=0.02)


def test_a_pair_called_twice_has_one_weight():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            return self.pair(self.pair(x))

    x = data(2, 4, 6, 6)
    prepared = prepare_qat_pt2e(capture(Twice().train(), (x,)), quantizer())
    first, second = prepared.meta[FUSED]
    assert first.scaled == second.scaled
    train(prepared, [x, x])
    with torch.no_grad():
        y, converted = range_tolerance(prepared)(x), convert_pt2e(prepared)
        torch.testing.assert_close(converted(x), y, rtol=0, atol=0.05)
    weights = {n.args[0] for n in converted.graph.nodes if "dequantize_per_channel" in str(n.target)}
    assert len(weights) == 1


def test_one_weight_under_two_norms_has_two_scales():
    torch.manual_seed(0)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.a.weight.data.fill_(4.0)

        def forward(self, x):
            return self.b(self.conv(self.a(self.conv(x)).relu()))

    x = data(2, 3, 6, 6)
    model = Shared().train()
    prepared = prepare_qat_pt2e(capture(model, (x,)), quantizer())
    train(prepared, [x, x])
    with torch.no_grad():
        y, converted = range_tolerance(prepared)(x), convert_pt2e(prepared)
        torch.testing.assert_close(converted(x), y, rtol=0, atol=0.05)
    scales = {n.args[1] for n in converted.graph.nodes if "dequantize_per_channel" in str(n.target)}
    assert len(scales) == 2


def test_copies_pickles_and_state_dicts_convert_to_the_same():
    torch.manual_seed(0)
    model, x = Residual().train(), data(4, 3, 8, 8)
    captured = capture(model, (x,))
    prepared = prepare_qat_pt2e(captured, quantizer())
    train(prepared, [x] * 3)
    range_tolerance(prepared)
    loaded = prepare_qat_pt2e(captured, quantizer())
    loaded.load_state_dict(prepared.state_dict())
    loaded.eval()
    with torch.no_grad():
        expected = convert_pt2e(prepared)(x)
        for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)), loaded):
            assert torch.equal(convert_pt2e(other)(x), expected)


def test_conversion_shares_no_tensor_with_what_is_trained_on():
    torch.manual_seed(0)
    model, x = Residual().train(), data(4, 3, 8, 8)
    prepared = prepare_qat_pt2e(capture(model, (x,)), quantizer())
    train(prepared, [x] * 2)
    with torch.no_grad():
        converted = convert_pt2e(prepared.eval())
        y = converted(x)
    prepared.train()
    train(prepared, [x] * 2, lr=1.0)
    with torch.no_grad():
        assert torch.equal(converted(x), y)
    assert not any(p.requires_grad for p in converted.parameters())
    assert not {p.data_ptr() for p in converted.parameters()} & {p.data_ptr() for p in prepared.parameters()}


def test_float_convolutions_keep_their_norm_until_conversion():
    torch.manual_seed(0)
    model, x = Residual().train(), data(4, 3, 8, 8)
    q = quantizer().set_module_name("second", None)
    prepared = prepare_qat_pt2e(capture(model, (x,)), q)
    assert [record.mac for record in prepared.meta[FUSED]] == ["conv2d"]
    train(prepared, [x] * 2)
    with torch.no_grad():
        y, converted = range_tolerance(prepared)(x), convert_pt2e(prepared)
        torch.testing.assert_close(converted(x), y, rtol=0, atol=0.02)
    assert not any(node.target is aten.batch_norm.default for node in converted.graph.nodes)


# ---------------------------------------------------------------- switches


def test_train_and_eval_switch_a_prepared_model():
    torch.manual_seed(0)
    model, x = Residual().train(), data(4, 3, 8, 8)
    prepared = prepare_qat_pt2e(capture(model, (x,)), quantizer())
    text = str(prepared.graph)
    quant2e.move_exported_model_to_eval(prepared)
    var = prepared.get_buffer("first.norm.running_var").clone()
    prepared(x)
    assert torch.equal(prepared.get_buffer("first.norm.running_var"), var)
    quant2e.move_exported_model_to_train(prepared)
    assert str(prepared.graph) == text
    prepared(x)
    assert not torch.equal(prepared.get_buffer("first.norm.running_var"), var)


def test_frozen_norms_keep_their_statistics_and_train_their_scale():
    torch.manual_seed(0)
    model, x = Residual().train(), data(4, 3, 8, 8)
    prepared = prepare_qat_pt2e(capture(model, (x,)), quantizer())
    train(prepared, [x])
    assert freeze_batch_norm(prepared) is prepared
    for switch in (lambda: None, prepared.eval, prepared.train, lambda: copy.deepcopy(prepared).train()):
        switch()
        assert not any(n.args[5] for n in prepared.graph.nodes if n.target is aten.batch_norm.default)
    assert prepared.training
    assert any(n.target is aten.dropout.default and n.args[2] for n in prepared.graph.nodes)
    var, gain = (
        prepared.get_buffer("first.norm.running_var").clone(),
        prepared.get_parameter("first.norm.weight").clone(),
    )
    train(prepared, [x])
    assert torch.equal(prepared.get_buffer("first.norm.running_var"), var)
    assert not torch.equal(prepared.get_parameter("first.norm.weight"), gain)
    freeze_batch_norm(prepared, False)
    train(prepared, [x])
    assert not torch.equal(prepared.get_buffer("first.norm.running_var"), var)
    with pytest.raises(Quant2eError, match="captured or prepared"):
        freeze_batch_norm(model)


# ---------------------------------------------------------------- loud


def test_what_would_be_silent_is_an_error():
    torch.manual_seed(0)
    model, x = Residual().train(), data(4, 3, 8, 8)
    captured = capture(model, (x,))
    prepared = prepare_qat_pt2e(captured, quantizer())
    with pytest.raises(CaptureError, match=r"in training mode: call prepared.eval\(\)(.|\n)*'dropout'"):
        convert_pt2e(prepared)
    with pytest.raises(CalibrationError, match="saw no data"):
        convert_pt2e(copy.deepcopy(prepared).eval())
    with pytest.raises(CalibrationError, match="before switching observers off"):
        range_tolerance(copy.deepcopy(prepared))(x)
    with pytest.raises(Quant2eError, match="already prepared"):
        prepare_qat_pt2e(prepared, quantizer())
    train(prepared, [x])
    prepared.eval()
    with torch.no_grad():
        converted = convert_pt2e(prepared)
    converted(x)
    converted.train()
    with pytest.raises(CaptureError, match="a converted model cannot be trained"):
        converted(x)
    with torch.no_grad():
        converted(x)
    with pytest.raises(Quant2eError, match="converted already"):
        prepare_qat_pt2e(converted, quantizer())
    edited = copy.deepcopy(prepared)
    norm = next(n for n in edited.graph.nodes if n.name == edited.meta[FUSED][0].norm)
    norm.replace_all_uses_with(norm.args[0])
    edited.graph.erase_node(norm)
    with pytest.raises(Quant2eError, match="the prepared graph was edited"):
        convert_pt2e(edited)
    edited = copy.deepcopy(prepared)
    unscaled = next(n for n in edited.graph.nodes if n.name == edited.meta[FUSED][0].tail[1])
    unscaled.replace_all_uses_with(unscaled.args[0])
    edited.graph.erase_node(unscaled)
    with pytest.raises(Quant2eError, match="the prepared graph was edited: 'div"):
        edited.train()
    edited = copy.deepcopy(prepared)
    scaled = next(n for n in edited.graph.nodes if n.name == edited.meta[FUSED][0].scaled)
    scaled.replace_all_uses_with(scaled.args[0])
    edited.graph.erase_node(scaled)
    with pytest.raises(Quant2eError, match="the prepared graph was edited"):
        convert_pt2e(edited)


def test_norms_in_training_mode_that_no_conversion_folds_are_an_error():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(torch.relu(self.norm(x)))

    x = data(2, 3, 4, 4)
    prepared = prepare_qat_pt2e(capture(Alone().train(), (x,)), quantizer())
    prepared(x)
    with pytest.raises(CaptureError, match=r"'batch_norm'(.|\n)*norm"):
        convert_pt2e(prepared)
    converted = convert_pt2e(prepared.eval())
    assert any(node.target is aten.batch_norm.default for node in converted.graph.nodes)


def test_folding_in_training_mode_is_noted():
    x = data(2, 3, 6, 6)
    prepared = prepare_qat_pt2e(capture(PAIRS["conv2d"][0]().train(), (x,)), quantizer())
    prepared(x)
    report = record_of(convert_pt2e(prepared)).report
    assert any("converted in training mode" in note for note in report.notes)


def test_training_without_fake_quantizers_is_noted():
    x = data(2, 3, 6, 6)
    prepared = prepare_qat_pt2e(capture(PAIRS["conv2d"][0]().train(), (x,)), quantizer(is_qat=False))
    assert any("nothing is fake-quantized" in note for note in record_of(prepared).report.notes)


# ---------------------------------------------------------------- configurations


def test_configurations_for_training_make_the_modules_of_pt2e():
    static, dynamic = (quantizer(is_dynamic=dynamic) for dynamic in (False, True))
    x = data(2, 5)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).train()
    made = prepare_qat_pt2e(capture(model, (x,)), static)
    kinds = {type(m) for m in made.modules() if isinstance(m, FakeQuantize)}
    assert kinds == {FusedMovingAvgObsFakeQuantize}
    made = prepare_qat_pt2e(capture(model, (x,)), dynamic)
    inputs = [m for m in made.modules() if isinstance(m, DynamicFakeQuantize)]
    assert [(m.granularity, m.is_dynamic) for m in inputs] == [(PerToken(), True)] * 2
    of_tensors = X86InductorQuantizer().set_global("w8a8-dynamic-qat")
    made = prepare_qat_pt2e(capture(model, (x,)), of_tensors)
    inputs = [m for m in made.modules() if type(m) is FakeQuantize and m.is_dynamic]
    assert [m.activation_post_process.averaging_constant for m in inputs] == [1, 1]
    config = get_default_x86_inductor_quantization_config(is_qat=True, reduce_range=True)
    assert config.is_qat
    assert config.input_activation.quant_max == 127
    assert config is get_default_x86_inductor_quantization_config(is_qat=True, reduce_range=True)


def test_dynamic_training_finds_parameters_at_run_time():
    torch.manual_seed(0)
    x = data(4, 5)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).train()
    prepared = prepare_qat_pt2e(capture(model, (x,)), quantizer(is_dynamic=True))
    train(prepared, [x * i for i in range(1, 4)])
    prepared.eval()
    with torch.no_grad():
        y, converted = prepared(100 * x), convert_pt2e(prepared)
        assert torch.equal(converted(100 * x), y)
    assert sum("choose_qparams" in str(n.target) for n in converted.graph.nodes) == 2


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.trained = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.calibrated = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.dynamic = nn.Linear(8, 4)
        self.left = nn.Linear(4, 4)

    def forward(self, ids):
        return self.left(self.dynamic(self.calibrated(self.trained(self.table(ids)))))


def test_training_calibration_dynamic_and_weight_only_in_one_graph():
    torch.manual_seed(0)
    ids = torch.randint(0, 10, (4, 3))
    linear = (
        XNNPACKQuantizer()
        .set_module_name("trained", get_symmetric_quantization_config(True, is_qat=True))
        .set_module_name("calibrated", get_symmetric_quantization_config(True))
        .set_module_name("dynamic", get_symmetric_quantization_config(True, is_dynamic=True, is_qat=True))
    )
    tables = EmbeddingQuantizer().set_global(get_embedding_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(capture(Mixed().train(), (ids,)), ComposableQuantizer([tables, linear]))
    kinds = {v.op.name: v.kind for v in record_of(prepared).report.verdicts}
    assert kinds == {
        "embedding": "weight-only", "linear": "static", "relu": "static", "linear_1": "static", "relu_1": "static",
        "linear_2": "dynamic", "linear_3": "float",
    }  # fmt: skip
    train(prepared, [ids] * 5, lr=2.0)  # far enough for the calibrated weight to leave the range it was measured with
    with torch.no_grad():
        prepared(ids)
        y, converted = range_tolerance(prepared)(ids), convert_pt2e(prepared)
        z = converted(ids)
    weight = prepared.get_parameter("calibrated.0.weight").detach()
    stored = converted.get_buffer("calibrated.0.weight_quantized")
    scale = converted.get_buffer("calibrated.0.weight_scale")
    assert ((stored * scale[:, None] - weight).abs() <= scale[:, None] * 0.501).all()
    assert (z - y).abs().max() < 0.1 * y.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_learned_steps_train_and_convert(bits):
    torch.manual_seed(0)
    low, high = 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1
    act = QuantizationSpec(
        torch.int8,
        LearnableFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, use_grad_scaling=True),
        -128, 127, torch.per_tensor_affine,
    )  # fmt: skip
    weight = QuantizationSpec(
        torch.int8,
        LearnableFakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, use_grad_scaling=True),
        low, high, torch.per_channel_symmetric, ch_axis=0,
    )  # fmt: skip
    x = data(4, 3, 8, 8)
    q = XNNPACKQuantizer().set_global(QuantizationConfig(act, act, weight, None, is_qat=True))
    prepared = prepare_qat_pt2e(capture(PAIRS["conv2d"][0]().train(), (x,)), q)
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-3)
    prepared(x)
    prepared.apply(quant2e.enable_range_learning)
    learned = {name: p.detach().clone() for name, p in prepared.named_parameters() if "activation_post" in name}
    assert len(learned) == 6
    for i in range(3):
        optimizer.zero_grad()
        (prepared(x + i) ** 2).mean().backward()
        optimizer.step()
    moved = [name for name, p in prepared.named_parameters() if name in learned and not torch.equal(p, learned[name])]
    assert sum(name.endswith("scale") for name in moved) == 3
    prepared.eval()
    with torch.no_grad():
        y, converted = prepared(x), convert_pt2e(prepared)
        torch.testing.assert_close(converted(x), y, rtol=0, atol=0.05)
    node = next(n for n in converted.graph.nodes if "dequantize_per_channel" in str(n.target))
    assert tuple(node.args[4:6]) == (low, high)


def test_fixed_parameters_are_fake_quantized_with():
    def annotate(gm):
        node = next(n for n in gm.graph.nodes if n.target is aten.sigmoid.default)
        fixed = quant2e.FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255)
        node.meta["quantization_annotation"] = quant2e.QuantizationAnnotation(output_qspec=fixed)
        return gm

    class OfSigmoid(quant2e.Quantizer):
        def annotate(self, model):
            return annotate(model)

        def validate(self, model):
            pass

    x = data(3, 4).requires_grad_()
    prepared = prepare_qat_pt2e(capture(nn.Sigmoid().train(), (x.detach(),)), OfSigmoid())
    y = prepared(x)
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    assert torch.equal(convert_pt2e(prepared)(x.detach()), y.detach())


def test_a_norm_whose_convolution_is_quantized_on_its_own_stays():
    class BlindToNorms(quant2e.Quantizer):
        """Quantizes what a convolution gives, before its norm."""

        def annotate(self, model):
            act = get_symmetric_quantization_config(True, is_qat=True)
            for node in model.graph.nodes:
                if node.target is aten.conv2d.default:
                    inputs = {node.args[0]: act.input_activation, node.args[1]: act.weight}
                    node.meta["quantization_annotation"] = quant2e.QuantizationAnnotation(inputs, act.output_activation)
            return model

        def validate(self, model):
            pass

    x = data(2, 3, 6, 6)
    prepared = prepare_qat_pt2e(capture(PAIRS["conv2d"][0]().train(), (x,)), BlindToNorms())
    assert prepared.meta[FUSED] == ()
    prepared(x)
    y = range_tolerance(prepared)(x)
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(x), y)
    assert any(node.target is aten.batch_norm.default for node in converted.graph.nodes)


def test_calibration_still_folds_first():
    x = data(2, 3, 6, 6)
    prepared = prepare_pt2e(capture(PAIRS["conv2d"][0]().eval(), (x,)), quantizer(is_qat=False))
    assert FUSED not in prepared.meta
    assert not any(node.target is aten.batch_norm.default for node in prepared.graph.nodes)


# ---------------------------------------------------------------- peers


@pytest.mark.slow  # torchao exports a hundred patterns
def test_conversion_gives_torchaos_numbers_on_the_same_parameters():
    """Train in torchao, hand its weights, statistics and ranges over, convert in both."""
    ao = pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e as ao_convert
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e as ao_prepare
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer as AoQuantizer
    from torchao.testing.pt2e._xnnpack_quantizer import get_symmetric_quantization_config as ao_config

    torch.manual_seed(0)
    x = data(4, 3, 8, 8)
    for is_per_channel in (True,):
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
        ).train()
        theirs = ao_prepare(
            torch.export.export(model, (x,)).module(),
            AoQuantizer().set_global(ao_config(is_per_channel=is_per_channel, is_qat=True)),
        )
        train(theirs, [data(4, 3, 8, 8, seed=i) for i in range(3)])
        mine = prepare_qat_pt2e(capture(model, (x,)), _without_bias_grid(is_per_channel))
        state = theirs.state_dict()
        own = [n.target for n in mine.graph.nodes if n.op == "call_module"]
        other = [n.target for n in theirs.graph.nodes if n.op == "call_module" and "activation" in n.target]
        names = dict(zip(other, own, strict=True))
        moved = {
            names.get(key.split(".")[0], key.split(".")[0]) + key[len(key.split(".")[0]) :]: v
            for key, v in state.items()
        }
        mine.load_state_dict(moved)
        ao.move_exported_model_to_eval(theirs)
        mine.eval()
        with torch.no_grad():
            assert torch.equal(convert_pt2e(mine)(x), ao_convert(theirs)(x))


def _without_bias_grid(is_per_channel):
    """Our XNNPACK rules put biases on the accumulator's grid, which torchao leaves to the delegate."""
    from dataclasses import replace

    class Plain(XNNPACKQuantizer):
        def table(self, config):
            kept = lambda rule: {name: spec for name, spec in rule.operands.items() if name != "b"}
            return [replace(rule, operands=kept(rule)) for rule in super().table(config)]

    return Plain().set_global(get_symmetric_quantization_config(is_per_channel, is_qat=True))


# ---------------------------------------------------------------- lowering


@pytest.mark.slow
def test_the_delegate_takes_all_of_a_trained_network(tmp_path):
    pytest.importorskip("executorch")
    import lowering

    torch.manual_seed(0)
    model, x = Residual().train(), data(2, 3, 8, 8)
    prepared = prepare_qat_pt2e(capture(model, (x,)), quantizer())
    train(prepared, [x] * 2)
    with torch.no_grad():
        converted = convert_pt2e(prepared.eval())
        y = converted(x)
    quant2e.save(converted, tmp_path / "trained.pt2", (x,))
    again = quant2e.load(tmp_path / "trained.pt2")
    assert torch.equal(again(x), y)
    program = lowering.to_executorch(again, (x,))
    assert "1 delegate(s)" in str(program.report)
    assert "0 op(s) left to kernels" in str(program.report)


@pytest.mark.inductor
def test_inductor_runs_a_trained_network_on_integers():
    import lowering

    torch.manual_seed(0)
    model, x = PAIRS["conv2d, no bias, relu6"][0]().train(), data(2, 3, 8, 8)
    q = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(capture(model, (x,)), q)
    train(prepared, [x] * 2)
    with torch.no_grad():
        converted = convert_pt2e(prepared.eval())
        fast = lowering.to_inductor(converted, (x,))
        torch.testing.assert_close(fast(x), converted(x), rtol=0, atol=1e-5)
    assert "1 of 1 ops" in str(fast.report)


@pytest.mark.slow  # a graph for each stretch between two fake-quantizers
def test_norms_train_under_compilation():
    torch.manual_seed(0)
    model, x = Residual().train(), data(4, 3, 8, 8)
    model.drop.p = 0.0
    captured = capture(model, (x,))
    eager, made = prepare_qat_pt2e(captured, quantizer()), prepare_qat_pt2e(captured, quantizer())
    compiled = torch.compile(made, backend="aot_eager")
    batches = [data(4, 3, 8, 8, seed=i) for i in range(3)]
    losses = train(eager, batches)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.02)
    for x, expected in zip(batches, losses, strict=True):
        optimizer.zero_grad()
        loss = (compiled(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(loss.item(), expected, rtol=1e-3, atol=0)
    made.eval().apply(disable_observer)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(x), rtol=0, atol=1e-6)
        assert torch.equal(convert_pt2e(made)(x), made(x))


# ---------------------------------------------------------------- several processes


def on_this_rank(rank):
    """Three steps on a shard; the outputs of the converted model."""
    torch.manual_seed(0)
    x = data(4, 3, 8, 8)
    prepared = prepare_qat_pt2e(capture(Residual().train(), (x,)), quantizer())
    replicated = nn.parallel.DistributedDataParallel(prepared)
    optimizer = torch.optim.SGD(replicated.parameters(), lr=0.05)
    for i in range(3):
        optimizer.zero_grad()
        (replicated(data(4, 3, 8, 8, seed=10 * i + rank)) ** 2).mean().backward()
        optimizer.step()
    replicated(x)  # buffers of rank 0 reach the others before the step
    prepared.eval()
    with torch.no_grad():
        return convert_pt2e(prepared)(x).tolist()


WORKER = """
import json, sys
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_qat import on_this_rank
rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
print(json.dumps(on_this_rank(rank)))
"""


@pytest.mark.slow
def test_processes_train_together(tmp_path):
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment) for rank in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=240)[0]) for process in running)
    assert first == second
    assert torch.tensor(first).isfinite().all()
