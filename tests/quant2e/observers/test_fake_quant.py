"""Fake-quantize modules: switches, buffers, what they observe, and that convert gets what forward used."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import quant2e
from quant2e import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    HistogramObserver,
    LearnableFakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerGroupMinMaxObserver,
    pt2e,
)
from quant2e.errors import AnnotationError, CalibrationError
from quant2e.observers.encodings import DynamicEncoding, PerChannelEncoding, PerGroupEncoding, PerTensorEncoding, encode
from quant2e.ranges.qparams import dequantize_per_channel, fake_quantize_per_tensor, quantize_per_channel

DEFAULTS = [n for n in pt2e.__all__ if "fake_quant" in n and not isinstance(getattr(pt2e, n), type)]
FACTORIES = [name for name in DEFAULTS if hasattr(getattr(quant2e, name), "with_args")]
X = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FACTORIES)
def test_ready_made_ones_agree_with_torchao(name):
    ao = pytest.importorskip("torchao.quantization.pt2e.fake_quantize")
    mine, theirs = getattr(quant2e, name)(), getattr(ao, name)()
    y, expected = mine(X), theirs(X)
    histogram = name == "default_histogram_fake_quant"  # the searches differ, on purpose
    if mine.zero_point.dtype == torch.int32 and not histogram:
        assert torch.equal(y, expected)
        assert torch.equal(mine.scale, theirs.scale)
    mine.eval()
    mine(X)
    scale, zero_point = theirs.calculate_qparams()
    torch.testing.assert_close(mine.calculate_qparams()[0], scale, rtol=0.05 if histogram else 0, atol=0)
    assert torch.equal(mine.zero_point, zero_point.to(mine.zero_point.dtype))
    assert mine.zero_point.dtype == theirs.zero_point.dtype
    assert (mine.quant_min, mine.quant_max, mine.qscheme) == (theirs.quant_min, theirs.quant_max, theirs.qscheme)


@pytest.mark.parametrize("name", FACTORIES)
def test_copies_pickles_and_state_dicts_compute_the_same(name):
    fq = getattr(quant2e, name)()
    fq(X)
    fq.disable_observer()
    y = fq(X)
    loaded = getattr(quant2e, name)()
    loaded.load_state_dict(fq.state_dict())
    for other in (copy.deepcopy(fq), pickle.loads(pickle.dumps(fq)), loaded):
        assert not other.observer_enabled
        assert torch.equal(other(X), y)
        assert torch.equal(other.calculate_qparams()[0], fq.calculate_qparams()[0])
    assert {"scale", "zero_point", "fake_quant_enabled", "observer_enabled"} <= fq.state_dict().keys()


def test_a_checkpoint_of_torchao_loads():
    ao = pytest.importorskip("torchao.quantization.pt2e.fake_quantize")
    theirs = ao.default_fused_per_channel_wt_fake_quant()
    theirs(X)
    mine = quant2e.default_fused_per_channel_wt_fake_quant()
    mine.load_state_dict(theirs.state_dict())
    assert torch.equal(mine.scale, theirs.scale)
    mine.disable_observer()
    theirs.disable_observer()
    assert torch.equal(mine(X), theirs(X))
    assert isinstance(encode(mine), PerChannelEncoding)


def test_switches():
    fq = nn.Sequential(FakeQuantize(), nn.ReLU())
    x = X.abs()
    assert not torch.equal(fq(x), x)
    fq.apply(quant2e.disable_fake_quant)
    assert torch.equal(fq(x), x)
    seen = fq[0].activation_post_process.total
    fq.apply(quant2e.disable_observer)
    scale = fq[0].scale.clone()
    fq(100 * x)
    assert fq[0].activation_post_process.total == seen
    fq.apply(quant2e.enable_fake_quant)
    assert fq(100 * x).max() == 255 * scale or fq(100 * x).max() <= 256 * scale
    fq.apply(quant2e.enable_observer)
    fq(100 * x)
    assert fq[0].scale > scale


@pytest.mark.parametrize("numbers", [{"quant_min": -127}, {"quant_min": -128}, {"quant_min": -8, "quant_max": 7}])
def test_in_evaluation_the_scale_is_converts_whatever_training_used(numbers):
    fq = quant2e.default_fused_wt_fake_quant.with_args(**numbers)()
    x = torch.where(X < 0, 3 * X, X)  # the smallest value decides
    fq(x)
    trained = fq.scale.clone()
    fq.eval()
    fq.disable_observer()
    y = fq(x)
    e = encode(fq)
    assert torch.equal(y, fake_quantize_per_tensor(x, e.scale, e.zero_point, e.quant_min, e.quant_max, e.dtype))
    assert abs(float(trained) / e.scale - 1) < 1 / 127
    fq.train()
    assert torch.equal(fq(x), y)  # nothing observed, nothing moved


def test_nan_does_not_reach_the_kernels_average():
    fq = quant2e.default_fused_act_fake_quant()
    fq(X)
    low = fq.activation_post_process.min_val.clone()
    fq(torch.where(X > 1, torch.nan, X))
    fq(torch.where(X > 1, torch.inf, X))
    assert torch.isfinite(fq.activation_post_process.max_val)
    assert fq.activation_post_process.min_val <= low * 0.9
    assert (fq.activation_post_process.nan_count, fq.activation_post_process.posinf_count) == (int((X > 1).sum()),) * 2


@pytest.mark.parametrize("make", [FakeQuantize, lambda: LearnableFakeQuantize(MovingAverageMinMaxObserver)])
def test_no_scale_without_data(make):
    fq = make()
    with pytest.raises(CalibrationError, match="no data"):
        fq.calculate_qparams()
    with pytest.raises(CalibrationError, match="no data"):
        encode(fq)
    if isinstance(fq, FakeQuantize):
        fq.disable_observer()
        with pytest.raises(CalibrationError, match="before switching observers off"):
            fq(X)
        fq.disable_fake_quant()
        assert torch.equal(fq(X), X)


@pytest.mark.parametrize("observer", [MovingAverageMinMaxObserver, MinMaxObserver, HistogramObserver])
def test_forward_is_what_convert_writes_per_tensor(observer):
    fq = FakeQuantize(observer=observer, dtype=torch.int8, quant_min=-128, quant_max=127)
    for i in range(3):
        fq(X * (i + 1))
    fq.disable_observer()
    e = encode(fq)
    assert isinstance(e, PerTensorEncoding)
    expected = fake_quantize_per_tensor(X, e.scale, e.zero_point, e.quant_min, e.quant_max, e.dtype)
    assert torch.equal(fq(X), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_forward_is_what_convert_writes_per_channel(axis):
    fq = FusedMovingAvgObsFakeQuantize(
        observer=MovingAveragePerChannelMinMaxObserver,
        quant_min=-8,
        quant_max=7,
        dtype=torch.int8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=axis,
    )
    fq(X)
    fq.eval()
    y = fq(X)
    e = encode(fq)
    assert isinstance(e, PerChannelEncoding)
    assert e.axis == axis
    q = quantize_per_channel(X, e.scale, e.zero_point, axis, e.quant_min, e.quant_max, e.dtype)
    assert torch.equal(y, dequantize_per_channel(q, e.scale, e.zero_point, axis))


def test_groups_train_and_encode():
    fq = FakeQuantize(observer=PerGroupMinMaxObserver, group_size=5, dtype=torch.int8, quant_min=-8, quant_max=7)
    x = X.clone().requires_grad_()
    y = fq(x)
    y.sum().backward()
    e = encode(fq)
    assert isinstance(e, PerGroupEncoding)
    assert e.scale.shape == (6, 2)
    scale, zero_point = e.scale.flatten(), e.zero_point.flatten()
    q = quantize_per_channel(X.reshape(12, 5), scale, zero_point, 0, -8, 7, torch.int8)
    assert torch.equal(y, dequantize_per_channel(q, scale, zero_point, 0).view_as(X))
    assert x.grad.abs().sum() > 0


def test_the_smallest_scale_holds_in_training_as_it_does_in_convert():
    fq = FusedMovingAvgObsFakeQuantize(dtype=torch.int8, quant_min=-128, quant_max=127, eps=2**-12)
    fq(X * 1e-4)
    assert fq.scale.item() == 2**-12 == encode(fq).scale


def test_the_moving_average_is_torchs():
    fq = FusedMovingAvgObsFakeQuantize()
    low, high = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    scale, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    on = torch.ones(1, dtype=torch.long)
    for i in range(5):
        x = X * (1 + 0.3 * i) + 0.1 * i
        fq(x)
        torch.fused_moving_avg_obs_fake_quant(x, on, on, low, high, scale, zero, 0.01, 0, 255, -1, False, False)
    assert torch.equal(fq.activation_post_process.min_val, low)
    assert torch.equal(fq.activation_post_process.max_val, high)


def test_dynamic_parameters_are_those_of_each_batch():
    fq = quant2e.default_dynamic_fake_quant()
    fq(100 * X)
    y = fq(X)
    fresh = quant2e.default_dynamic_fake_quant()
    assert torch.equal(y, fresh(X))
    assert encode(fq) == DynamicEncoding(symmetric=False, eps=fq.eps, quant_min=0, quant_max=255, dtype=torch.uint8)


def test_one_bad_batch_does_not_stop_training_and_convert_says_so():
    fq = FakeQuantize()
    fq(X)
    before = fq.scale.clone()
    fq(torch.where(X > 1, torch.nan, X))
    assert torch.isfinite(fq.scale).all()
    assert fq.scale > 0.5 * before
    with pytest.raises(CalibrationError, match="NaN"):
        encode(fq)


def test_fixed_parameters():
    fq = quant2e.default_fixed_qparams_range_0to1_fake_quant()
    y = fq(X)
    assert y.min() == 0
    assert y.max() == 255 / 256
    assert encode(fq) == PerTensorEncoding(scale=1 / 256, zero_point=0, quant_min=0, quant_max=255, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FusedMovingAvgObsFakeQuantize(HistogramObserver), "no moving average"),
        (lambda: FixedQParamsFakeQuantize(MinMaxObserver), "no fixed scale"),
        (lambda: FakeQuantize(quant_min=3, quant_max=1), "quant_min=3"),
        (lambda: FakeQuantize(quant_min=3), "give both"),
        (lambda: FakeQuantize(quant2e.PlaceholderObserver, dtype=torch.float16), "measures no range"),
        (lambda: FakeQuantize(is_dynamic=True), "dynamic quantization has no history"),
        (lambda: LearnableFakeQuantize(MovingAverageMinMaxObserver, quant_min=9, quant_max=1), "quant_min=9"),
    ],
)
def test_what_cannot_work_is_refused(make, match):
    with pytest.raises(AnnotationError, match=match):
        make()


def test_half_precision_keeps_exact_parameters():
    fq = nn.Sequential(FakeQuantize())
    y = fq(X)
    fq.bfloat16()
    assert fq[0].scale.dtype == torch.float32
    torch.testing.assert_close(fq(X.bfloat16()).float(), y, rtol=0.02, atol=0.02)


def test_factories_are_values():
    assert quant2e.default_fake_quant == quant2e.default_fake_quant.with_args(quant_min=0)
    assert quant2e.default_fake_quant != quant2e.default_histogram_fake_quant


# ---------------------------------------------------------------- learned steps


def learnable(**options):
    return LearnableFakeQuantize(
        MovingAverageMinMaxObserver, dtype=torch.int8, quant_min=-8, quant_max=7, use_grad_scaling=True, **options
    )


def test_learning_moves_scale_and_zero_point():
    fq = learnable()
    fq(X)
    fq.apply(quant2e.enable_range_learning)
    assert not fq.observer_enabled
    optimizer = torch.optim.SGD(fq.parameters(), lr=0.5)
    start = fq.scale.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        ((fq(X) - X) ** 2).sum().backward()
        optimizer.step()
    assert not torch.equal(fq.scale, start)
    e = encode(fq)
    fq.apply(quant2e.disable_range_learning)
    assert torch.equal(fq(X), fake_quantize_per_tensor(X, e.scale, e.zero_point, -8, 7, torch.int8))
    assert not any(p.requires_grad for p in fq.parameters())


def test_a_symmetric_zero_point_stays_zero():
    fq = learnable(qscheme=torch.per_tensor_symmetric)
    fq(X)
    fq.enable_range_learning()
    optimizer = torch.optim.SGD(fq.parameters(), lr=10.0)
    (fq(X) ** 2).sum().backward()
    optimizer.step()
    assert fq.zero_point.item() == 0
    assert encode(fq).zero_point == 0


def test_an_optimizer_made_before_the_data_trains_the_scale():
    fq = learnable()
    fq.allocate()
    optimizer = torch.optim.SGD(fq.parameters(), lr=0.1)
    fq(X)
    fq.enable_range_learning()
    measured = fq.scale.detach().clone()
    (fq(X) ** 2).sum().backward()
    optimizer.step()
    assert not torch.equal(fq.scale, measured)


def test_a_negative_scale_is_held_at_the_smallest():
    fq = learnable(eps=1e-3)
    fq(X)
    fq.disable_observer()
    fq.scale.data.fill_(-0.5)
    assert encode(fq).scale == pytest.approx(1e-3)
    assert fq(X).abs().max() <= 16 * 1e-3


def test_a_learned_state_dict_loads_into_a_new_module():
    fq = learnable()
    fq(X)
    fq.enable_range_learning()
    buffer = io.BytesIO()
    torch.save(fq.state_dict(), buffer)
    buffer.seek(0)
    new = learnable()
    new.load_state_dict(torch.load(buffer))
    assert torch.equal(new(X), fq(X))
    assert new.scale.requires_grad
    assert isinstance(copy.deepcopy(new).scale, nn.Parameter)


@pytest.mark.parametrize("made", [FakeQuantize(MovingAverageMinMaxObserver), FusedMovingAvgObsFakeQuantize()])
def test_evaluation_leaves_the_range_of_a_weight_as_training_left_it(made):
    made.of_constant = True
    weight = nn.Parameter(torch.linspace(-1, 1, 64))
    made(weight)
    trained = made.calculate_qparams()[0].clone()
    made.eval()
    with torch.no_grad():
        first, second = made(weight * 2), made(weight * 2)
    assert torch.equal(first, second)
    assert torch.equal(made.calculate_qparams()[0], trained)
    made(weight * 2)  # trained in evaluation mode, with gradients
    assert made.calculate_qparams()[0] > trained


def test_a_weight_that_is_first_seen_in_evaluation_gives_a_range():
    made = FakeQuantize(MovingAverageMinMaxObserver).eval()
    made.of_constant = True
    with torch.no_grad():
        made(torch.linspace(-1, 1, 64))
    assert made.calculate_qparams()[0] > 0
