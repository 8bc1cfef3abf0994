"""What is validated is what is deployed: a trained model in evaluation and its converted graph, bit for bit."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from quant2e import (
    FakeQuantize,
    MovingAveragePerChannelMinMaxObserver,
    QuantizationWarning,
    capture,
    convert_pt2e,
    disable_observer,
    freeze_batch_norm,
    prepare_pt2e,
    prepare_qat_pt2e,
)
from quant2e.graph.captured.module import copy_graph
from quant2e.observers.derived import DerivedObserver
from quant2e.report.record import record_of
from quantizers import (
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)

aten = torch.ops.aten


class Chain(nn.Module):
    """Ops one after the other; a name that occurs twice is one module, called twice."""

    def __init__(self, calls, **parts):
        super().__init__()
        self.calls = calls.split()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        for name in self.calls:
            x = getattr(self, name)(x)
        return x


def conv(*sizes, **options):
    return nn.Conv2d(*sizes, 3, padding=1, **options)


class Move(nn.Module):
    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(*self.axes)


NETS = {
    "conv": (lambda: Chain("a r b", a=conv(3, 8), r=nn.ReLU(), b=conv(8, 4)), (4, 3, 8, 8)),
    "conv without bias": (lambda: Chain("a r b", a=conv(3, 8, bias=False), r=nn.ReLU(), b=conv(8, 4)), (4, 3, 8, 8)),
    "depthwise": (lambda: Chain("a r b", a=conv(6, 6, groups=6), r=nn.ReLU(), b=conv(6, 4)), (4, 6, 8, 8)),
    "linear": (lambda: Chain("a r b", a=nn.Linear(10, 8), r=nn.ReLU(), b=nn.Linear(8, 4)), (32, 10)),
    "transposed": (lambda: Chain("a r b", a=nn.ConvTranspose2d(3, 6, 3), r=nn.ReLU(), b=conv(6, 4)), (4, 3, 6, 6)),
    "conv, norm": (
        lambda: Chain("a n r b m", a=conv(3, 8, bias=False), n=nn.BatchNorm2d(8), r=nn.ReLU(), b=conv(8, 4),
                      m=nn.BatchNorm2d(4)), (8, 3, 8, 8)),
    "depthwise, norm": (
        lambda: Chain("a n r b", a=conv(6, 6, groups=6, bias=False), n=nn.BatchNorm2d(6), r=nn.ReLU6(), b=conv(6, 4)),
        (8, 6, 8, 8)),
    "transposed, norm": (
        lambda: Chain("a n r b", a=nn.ConvTranspose2d(3, 6, 3), n=nn.BatchNorm2d(6), r=nn.ReLU(), b=conv(6, 4)),
        (8, 3, 6, 6)),
    "linear, norm": (
        lambda: Chain("a n r b", a=nn.Linear(10, 8), n=nn.BatchNorm1d(8), r=nn.ReLU(), b=nn.Linear(8, 4)), (32, 10)),
    "linear, permute, norm": (
        lambda: Chain("a p n r q b", a=nn.Linear(10, 8), p=Move(0, 2, 1), n=nn.BatchNorm1d(8), r=nn.ReLU(),
                      q=Move(0, 2, 1), b=nn.Linear(8, 4)), (8, 5, 10)),
    "a pair called twice": (
        lambda: Chain("s a n r a n r b", s=conv(3, 6), a=conv(6, 6), n=nn.BatchNorm2d(6), r=nn.ReLU(), b=conv(6, 4)),
        (8, 3, 8, 8)),
    "one conv, two norms": (
        lambda: Chain("s a n r a m r", s=conv(3, 6), a=conv(6, 6), n=nn.BatchNorm2d(6), m=nn.BatchNorm2d(6),
                      r=nn.ReLU()), (8, 3, 8, 8)),
    "a shared linear": (
        lambda: Chain("a r a r b", a=nn.Linear(10, 10), r=nn.ReLU(), b=nn.Linear(10, 4)), (32, 10)),
}  # fmt: skip

CHANNELS = {
    "as initialised": None,
    "small": lambda n: torch.full((n,), 0.03),
    "spread": lambda n: torch.logspace(-3, 1, n),
}


def spread(model, factors):
    """Scale output channels of products and norms, and give them biases that matter."""
    for part in {id(p): p for p in model.modules() if isinstance(getattr(p, "weight", None), nn.Parameter)}.values():
        transposed = isinstance(part, nn.ConvTranspose2d)
        channels = part.weight.shape[1 if transposed else 0]
        shape = [1] * part.weight.dim()
        shape[1 if transposed else 0] = -1
        with torch.no_grad():
            if factors is not None:
                part.weight.mul_(factors(channels).reshape(shape))
            if part.bias is not None:
                part.bias.uniform_(-2, 2)
    return model


def xnnpack(per_channel=True, **options):
    config = get_symmetric_quantization_config(is_per_channel=per_channel, is_qat=True, **options)
    return XNNPACKQuantizer().set_global(config)


QUANTIZERS = {
    "xnnpack": xnnpack,
    "xnnpack per tensor": lambda: xnnpack(False),
    "xnnpack 3 bits": lambda: xnnpack(weight_qmin=-3, weight_qmax=3),
    "x86": lambda: X86InductorQuantizer("avx512_vnni").set_global(
        get_default_x86_inductor_quantization_config(is_qat=True)
    ),
}


def data(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(prepared, optimizer, x):
    optimizer.zero_grad()
    loss = (prepared(x) ** 2).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(prepared.parameters(), 0.1)
    optimizer.step()


def trained(name, channels, quantizer, steps=3):
    torch.manual_seed(0)
    make, shape = NETS[name]
    model = spread(make(), CHANNELS[channels]).train()
    prepared = prepare_qat_pt2e(capture(model, (data(*shape, seed=0),)), quantizer)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.02)
    for i in range(steps):
        step(prepared, optimizer, data(*shape, seed=i + 1))
    return prepared, optimizer, shape


CASES = [(name, quantizer, channels) for name in NETS for quantizer in QUANTIZERS for channels in CHANNELS]
OFTEN = [case for case in CASES if case[1:] == ("xnnpack", "spread") or case[::2] == ("conv, norm", "as initialised")]


@pytest.mark.parametrize(
    ("name", "quantizer", "channels"),
    [pytest.param(*case, marks=[] if case in OFTEN else pytest.mark.slow) for case in CASES],
)
def test_evaluation_computes_what_is_converted(name, quantizer, channels):
    prepared, _, shape = trained(name, channels, QUANTIZERS[quantizer]())
    prepared.eval()
    prepared.apply(disable_observer)
    x = data(*shape, seed=99)
    with torch.no_grad():
        expected, converted = prepared(x), convert_pt2e(prepared)
        assert torch.equal(converted(x), expected)
    assert not any(node.target is aten.batch_norm.default for node in converted.graph.nodes)


def without_kernel():
    """Torch's fused kernel trains with another scale than is deployed; this one does not."""
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    factory = FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, eps=2**-16)
    weight = replace(config.weight, observer_or_fake_quant_ctr=factory)
    return XNNPACKQuantizer().set_global(replace(config, weight=weight))


@pytest.mark.parametrize("name", ["conv, norm", "linear, permute, norm"])
def test_training_with_frozen_norms_computes_what_is_converted(name):
    prepared, optimizer, shape = trained(name, "spread", without_kernel())
    text = str(prepared.graph)
    freeze_batch_norm(prepared)
    prepared.apply(disable_observer)
    for i in range(2):
        step(prepared, optimizer, data(*shape, seed=50 + i))
    for part in ("a.weight", "n.weight", "n.bias"):
        assert prepared.get_parameter(part).grad.abs().sum() > 0
    assert prepared.training
    x = data(*shape, seed=99)
    with torch.no_grad():
        assert torch.equal(convert_pt2e(prepared)(x), prepared(x))
    freeze_batch_norm(prepared, False)
    assert str(prepared.graph) == text


@pytest.mark.parametrize("gain", [0.0, 1e-42, -1e-30])
def test_a_gain_that_training_brings_to_zero_goes_on_training(gain):
    prepared, optimizer, shape = trained("conv, norm", "as initialised", xnnpack())
    with torch.no_grad():
        prepared.get_parameter("n.weight")[1] = gain
    step(prepared, optimizer, data(*shape, seed=7))
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in prepared.parameters() if p.grad is not None)
    assert prepared.get_parameter("n.weight").grad[1] != 0
    with torch.no_grad():
        prepared.get_parameter("n.weight")[1] = gain
    prepared.eval()
    prepared.apply(disable_observer)
    x = data(*shape, seed=99)
    with torch.no_grad():
        assert torch.equal(convert_pt2e(prepared)(x), prepared(x))


def test_copies_derive_biases_from_observers_of_their_own():
    prepared, _, shape = trained("conv", "as initialised", xnnpack())
    prepared.eval().apply(disable_observer)
    x, derived = data(*shape, seed=99), [m for m in prepared.modules() if isinstance(m, DerivedObserver)]
    assert len(derived) == 2
    before = prepared(x)
    for other in (copy.deepcopy(prepared), copy_graph(prepared), pickle.loads(pickle.dumps(prepared))):
        own = set(other.modules())
        copies = [m for m in own if isinstance(m, DerivedObserver)]
        assert all(source in own for m in copies for source in m.sources)
        assert not own & {source for m in derived for source in m.sources}
        assert torch.equal(other(x), before)


def test_a_calibrated_bias_in_a_trained_graph_has_the_grid_of_the_trained_weight():
    torch.manual_seed(0)
    make, shape = NETS["linear"]
    calibrated = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_qat_pt2e(capture(spread(make(), None).train(), (data(*shape, seed=0),)), calibrated)
    prepared(data(*shape, seed=1))
    with torch.no_grad():
        prepared.get_parameter("a.weight").mul_(3)
    converted = convert_pt2e(prepared.eval())
    x = next(n for n in converted.graph.nodes if "quantize_per_tensor" in str(n.target)).args[1]
    steps = converted.get_buffer("a.bias_on_grid").double() / (x * converted.get_buffer("a.weight_scale").double())
    torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-3)


# ---------------------------------------------------------------- the report


def moved(report):
    return [loss for loss in report.losses if "its bias moves" in loss]


def with_large_bias(per_channel):
    """One channel with large weights, whose step is coarse for the bias of the others: the result is small."""
    torch.manual_seed(0)
    net = Chain("a r", a=nn.Linear(4, 3), r=nn.ReLU())
    with torch.no_grad():
        net.a.weight.zero_()
        net.a.weight[0, 0], net.a.weight[1, 0] = 40.0, -40.0
        net.a.bias.copy_(torch.tensor([0.0, 0.0, 0.11]))
    x = torch.zeros(8, 4)
    x[:, 0], x[:, 1] = 1e-3, torch.linspace(-8, 8, 8)
    config = get_symmetric_quantization_config(is_per_channel=per_channel)
    prepared = prepare_pt2e(capture(net.eval(), (x,)), XNNPACKQuantizer().set_global(config))
    prepared(x)
    return prepared


def test_a_bias_that_moves_by_more_than_a_step_is_reported():
    with pytest.warns(QuantizationWarning, match="losing values"):
        converted = convert_pt2e(with_large_bias(False))
    (note,) = moved(record_of(converted).report)
    assert "'linear'" in note
    assert "in module 'a'" in note
    assert "steps of the result, 1 of 3 values by more than one" in note
    assert "What helps: a scale per channel for the weight" in note
    assert not moved(record_of(convert_pt2e(with_large_bias(True))).report)


def test_a_bias_that_does_not_fit_the_accumulator_is_reported():
    torch.manual_seed(0)
    net = Chain("a", a=nn.Linear(4, 3))
    with torch.no_grad():
        net.a.weight.mul_(1e-2)
        net.a.bias.copy_(torch.tensor([1e6, 0.5, -1e6]))
    x = 1e-2 * data(8, 4, seed=0)
    prepared = prepare_pt2e(
        capture(net.eval(), (x,)), XNNPACKQuantizer().set_global(get_symmetric_quantization_config(True))
    )
    prepared(x)
    (note,) = moved(record_of(convert_pt2e(prepared)).report)
    assert "2 values do not fit 32 bits" in note
