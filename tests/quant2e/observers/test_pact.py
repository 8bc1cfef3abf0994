"""PACT: values as convert writes them, the paper's gradients, its regularisation, state, and what it reaches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quant2e
from quant2e import LearnableFakeQuantize, MinMaxObserver, PACTFakeQuantize, PerChannelMinMaxObserver, clipping_penalty
from quant2e.errors import AnnotationError, CalibrationError, Quant2eError
from quant2e.pytorch_quantization import QuantDescriptor
from quant2e.ranges.qparams import fake_quantize_per_tensor
from quantizers import XNNPACKQuantizer

UNSIGNED = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 15, "qscheme": torch.per_tensor_affine}
SIGNED = {"dtype": torch.int8, "quant_min": -7, "quant_max": 7, "qscheme": torch.per_tensor_symmetric}
AFFINE = {"dtype": torch.int8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_tensor_affine}


def learning(x, **options):
    made = PACTFakeQuantize(MinMaxObserver, **options)
    made(x)
    made.enable_range_learning()
    return made


def test_the_papers_equations():
    """y = clamp(x, 0, a), quantized to steps of a / 15; dy/da is 1 from a on; dy/dx is 1 from 0 to a."""
    made = learning(torch.tensor([0.0, 1.5]), **UNSIGNED)
    assert made.alpha.tolist() == [1.5]
    assert made.beta.tolist() == [0]
    x = torch.tensor([-0.3, 0.0, 0.04, 0.06, 1.49, 1.5, 2.0], requires_grad=True)
    y = made(x)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 0.1, 1.5, 1.5, 1.5]))
    (y * torch.tensor([64.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])).sum().backward()
    assert x.grad.tolist() == [0, 1, 2, 4, 8, 0, 0]
    assert made.alpha.grad.tolist() == [48]
    assert made.beta.grad.tolist() == [-64]


def test_one_value_bounds_both_sides_of_symmetric_integers():
    made = learning(torch.tensor([-1.0, 0.4]), **SIGNED)
    assert made.alpha.tolist() == [1.0]
    assert made.beta is None
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0], requires_grad=True)
    (made(x) * torch.tensor([1.0, 2.0, 4.0, 8.0])).sum().backward()
    assert x.grad.tolist() == [0, 2, 4, 0]
    assert made.alpha.grad.tolist() == [7]


def test_where_integers_begin_at_zero_negative_values_move_nothing():
    made = PACTFakeQuantize(MinMaxObserver, amax=1.0, from_amax=True, **UNSIGNED)
    made(torch.tensor([-3.0, 0.5])).sum().backward()
    assert made.alpha.grad.tolist() == [0]


@pytest.mark.parametrize("options", [UNSIGNED, SIGNED, AFFINE], ids=["unsigned", "signed", "affine"])
def test_values_are_those_of_conversion(options):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    made = learning(x.abs() if options is UNSIGNED else x, **options)
    with torch.no_grad():
        made.alpha.mul_(0.7)
    scale, zero_point = made.calculate_qparams()
    numbers = (options["quant_min"], options["quant_max"], options["dtype"])
    assert torch.equal(made(x), fake_quantize_per_tensor(x, float(scale), int(zero_point), *numbers))
    if made.beta is None:
        assert float(scale) == pytest.approx(made.alpha.item() / 7, rel=1e-6)


def test_channels_have_values_of_their_own():
    options = SIGNED | {"qscheme": torch.per_channel_symmetric, "ch_axis": 1}
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    made = PACTFakeQuantize(PerChannelMinMaxObserver, **options)
    made(x)
    made.enable_range_learning()
    assert torch.equal(made.alpha, x.abs().amax(0))
    made(x * 2).sum().backward()
    over = (x * 2 >= x.abs().amax(0)).sum(0) - (x * 2 < -x.abs().amax(0)).sum(0)
    assert torch.equal(made.alpha.grad, over.float())


def test_a_given_amax_is_trained_from_the_beginning():
    made = QuantDescriptor(unsigned=True, amax=2.55, learn_amax=True).to_spec(is_qat=True).observer_or_fake_quant_ctr()
    assert made.alpha.requires_grad
    assert made.alpha.item() == pytest.approx(2.55)
    x = torch.tensor([0.004, 0.006, 9.0])
    torch.testing.assert_close(made(x), torch.tensor([0.0, 0.01, 2.55]))
    made.enable_observer()
    made(x)
    assert made.alpha.item() == pytest.approx(2.55)


def test_switches_and_state():
    made = PACTFakeQuantize(MinMaxObserver, **SIGNED)
    with pytest.raises(CalibrationError, match="has seen no data"):
        made.calculate_qparams()
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    made(x)
    assert not made.alpha.requires_grad
    made.apply(quant2e.enable_range_learning)
    assert made.alpha.requires_grad
    assert made.observer_enabled.item() == 0
    loaded = PACTFakeQuantize(MinMaxObserver, **SIGNED)
    loaded.load_state_dict(made.state_dict())
    assert torch.equal(loaded(x), made(x))
    assert loaded.alpha.requires_grad
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    made.disable_fake_quant()
    assert torch.equal(made(x), x)
    held = made.alpha
    made.enable_observer()
    made(10 * x)
    assert made.alpha is held
    assert held.item() == float((10 * x).abs().max())


def test_the_penalty_is_the_sum_of_squares():
    model = nn.Sequential(learning(torch.tensor([3.0]), **SIGNED), learning(torch.tensor([-1.0, 2.0]), **AFFINE))
    penalty = clipping_penalty(model)
    assert penalty.item() == 9 + 4 + 1
    penalty.backward()
    assert model[0].alpha.grad.tolist() == [6]
    with pytest.raises(Quant2eError, match="no clipping value is learned"):
        clipping_penalty(nn.Linear(2, 2))


def test_what_raises():
    with pytest.raises(AnnotationError, match="a learned range is static"):
        PACTFakeQuantize(MinMaxObserver, is_dynamic=True, **SIGNED)
    with pytest.raises(AnnotationError, match="amax bounds both sides"):
        PACTFakeQuantize(MinMaxObserver, amax=1.0, **AFFINE)
    with pytest.raises(AnnotationError, match="measures no range"):
        PACTFakeQuantize(quant2e.FixedQParamsObserver.with_args(scale=1.0, zero_point=0), **AFFINE)


# ---------------------------------------------------------------- what it reaches


def trained(kind, seed):
    """Accuracy of a small net with activations of 4 bits, trained with LSQ or PACT."""
    from dataclasses import replace

    generator = torch.Generator().manual_seed(7)
    centers = torch.randn(6, 12, generator=generator)
    labels = torch.randint(0, 6, (768,), generator=generator)
    x = centers[labels] + 0.9 * torch.randn(768, 12, generator=generator)
    x, labels, unseen, answers = x[:512], labels[:512], x[512:], labels[512:]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(100):
        at = torch.arange(64) + 64 * (step % 8)
        optimizer.zero_grad()
        F.cross_entropy(model(x[at]), labels[at]).backward()
        optimizer.step()
    from quantizers import get_symmetric_quantization_config

    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True, act_qmin=-8, act_qmax=7)
    activation = replace(config.input_activation, observer_or_fake_quant_ctr=kind)
    config = replace(config, input_activation=activation, output_activation=activation)
    graph = quant2e.capture(model, (x[:64],), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=1024)},))
    prepared = quant2e.prepare_qat_pt2e(graph, XNNPACKQuantizer().set_global(config))
    for at in range(4):
        prepared(x[64 * at : 64 * at + 64])
    prepared.apply(quant2e.enable_range_learning)
    optimizer = torch.optim.Adam(prepared.parameters(), 3e-3)
    for step in range(120):
        at = torch.arange(64) + 64 * (step % 8)
        optimizer.zero_grad()
        loss = F.cross_entropy(prepared(x[at]), labels[at])
        (loss + 1e-4 * clipping_penalty(prepared) if "PACT" in str(kind) else loss).backward()
        optimizer.step()
    prepared.eval()
    converted = quant2e.convert_pt2e(prepared)
    with torch.no_grad():
        assert torch.equal(converted(unseen), prepared(unseen))
    return float((converted(unseen).argmax(1) == answers).float().mean()), float(
        (model(unseen).argmax(1) == answers).float().mean()
    )


@pytest.mark.slow
def test_it_reaches_what_learned_steps_reach():
    observer = quant2e.MovingAverageMinMaxObserver
    pact, floats = zip(
        *(trained(PACTFakeQuantize.with_args(observer=observer), seed) for seed in range(2)), strict=True
    )
    lsq, _ = zip(*(trained(LearnableFakeQuantize.with_args(observer=observer), seed) for seed in range(2)), strict=True)
    assert sum(pact) / 2 > sum(lsq) / 2 - 0.02
    assert sum(pact) / 2 > sum(floats) / 2 - 0.05
