"""Ranges with which no two products leave a 16-bit lane, and what they cost: per layer, never more than 7 bits do."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lowering
from quant2e import calibrate, capture, convert_pt2e, prepare_pt2e, quantize
from quant2e.cpu import may_overflow
from quant2e.ranges.qparams import quantize_per_channel
from quant2e.ranges.sqnr import sqnr_db
from quantizers import ComposableQuantizer, EmbeddingQuantizer, X86InductorQuantizer
from quantizers import get_default_x86_inductor_quantization_config as config
from quantizers.x86.paired_ranges import TOPS, Agreement, PairedWeightObserver
from tests.quantizers.models import Of


def auto(policy="auto", **kwargs):
    return X86InductorQuantizer(isa="avx2", range_policy=policy).set_global(config(**kwargs))


def constants(gm):
    """(target, weight integers, largest activation integer) of each quantized product of a converted graph."""
    found = []
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        if len(inputs) > 1 and inputs[0].name.startswith("dequantize") and inputs[1].name.startswith("dequantize"):
            weight = inputs[1].args[0]
            if weight.op == "get_attr":
                found.append((node.name, gm.get_buffer(weight.target), inputs[0].args[4]))
    return found


# ---------------------------------------------------------------- the bound


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from(TOPS),
)
def test_scales_leave_room_for_any_two_products(rows, top):
    observer = PairedWeightObserver(
        dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_channel_symmetric, ch_axis=0
    )
    observer.agreement = Agreement()
    weight = torch.tensor(rows)
    observer(weight)
    scales, own = observer.scales(top), observer.grid.qparams(*observer.range())[0]
    integers = quantize_per_channel(weight, scales, torch.zeros(len(rows)), 0, -128, 127, torch.int8)
    assert not may_overflow(integers, top)
    # never finer than 8 bits, never coarser than the bound needs: at most 8 bits' loss of a step in limit - 1
    assert bool((scales >= own).all())
    assert bool((scales <= torch.maximum(own, own * 255 / (32767 // top - 1) * 1.001)).all())
    if top == 127:
        assert torch.equal(scales, own)


def test_a_lonely_outlier_costs_nothing():
    weight = torch.full((1, 64), 0.01)
    weight[0, 5] = 1.0
    observer = PairedWeightObserver(dtype=torch.int8, qscheme=torch.per_channel_symmetric, ch_axis=0)
    observer.agreement = Agreement()
    observer(weight)
    assert torch.equal(observer.scales(255), observer.grid.qparams(*observer.range())[0])  # 127 + 1 products of 255


# ---------------------------------------------------------------- what it costs

WEIGHTS = {
    "gaussian": lambda: torch.randn(48, 256),
    "uniform": lambda: torch.rand(48, 256) * 2 - 1,
    "heavy-tailed": lambda: torch.distributions.StudentT(3.0).sample((48, 256)),
}
INPUTS = {
    "relu": lambda: torch.randn(256, 256).relu(),
    "gaussian": lambda: torch.randn(256, 256),
    "uniform": lambda: torch.rand(256, 256),
    "outliers": lambda: torch.randn(256, 256) * torch.where(torch.arange(256) < 2, 30.0, 1.0),
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_choice_costs_no_more_than_seven_bits_on_either_side(weights, inputs):
    torch.manual_seed(0)
    model = nn.Linear(256, 48, bias=False).eval()
    model.weight.data = WEIGHTS[weights]() / 16
    gm = capture(model, (INPUTS[inputs](),))
    data, x = [(INPUTS[inputs](),) for _ in range(2)], INPUTS[inputs]()
    exact, found = model(x).detach(), {}
    for policy in ("7-bit activations", "7-bit weights", "auto"):
        converted = convert_pt2e(calibrate(prepare_pt2e(gm, auto(policy)), data))
        found[policy] = sqnr_db(float(exact.square().sum()), float((exact - converted(x)).square().sum()))
        for _, integers, top in constants(converted):
            assert not may_overflow(integers, top)
    assert found["auto"] >= max(found.values()) - 0.1, found


# ---------------------------------------------------------------- who agrees with whom


class Shared(nn.Module):
    """Three layers read one tensor; a depthwise convolution; a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.depthwise, self.twice = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        y = self.a(x).relu() + self.b(x)
        return self.twice(self.twice(self.depthwise(y)).relu())


IMAGES = [(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)),) for i in range(3)]


def tops(prepared):
    return {
        layer: observer.agreement.top()
        for observer in prepared.modules()
        if isinstance(observer, PairedWeightObserver) and observer.agreement is not None
        for layer in observer.layers
    }


def test_layers_that_read_one_tensor_agree_and_depthwise_ones_are_free():
    prepared = calibrate(prepare_pt2e(capture(Shared().eval(), IMAGES[0]), auto()), IMAGES)
    agreements = {
        observer.layers: observer.agreement
        for observer in prepared.modules()
        if isinstance(observer, PairedWeightObserver)
    }
    assert {layers: None if a is None else len(a.activations) for layers, a in agreements.items()} == {
        ("conv2d",): 1, ("conv2d_1",): 1, (): None, ("conv2d_3", "conv2d_4"): 2,
    }  # fmt: skip
    assert agreements["conv2d",] is agreements["conv2d_1",] is not agreements["conv2d_3", "conv2d_4"]
    found = {name: (integers, top) for name, integers, top in constants(convert_pt2e(prepared))}
    assert found["conv2d_2"][1] == 255
    assert may_overflow(found["conv2d_2"][0], 255)  # and yet exact: its kernel adds in 32 bits
    for name in ("conv2d", "conv2d_1", "conv2d_3", "conv2d_4"):
        assert not may_overflow(*found[name])
        assert found[name][1] == tops(prepared)[name]


def test_the_report_says_what_was_chosen():
    result = quantize(Shared().eval(), IMAGES[0], auto(), IMAGES)
    said = [note for note in result.report.notes if "activations use" in note]
    assert [note.partition(":")[0] for note in said] == ["conv2d", "conv2d_1", "conv2d_3, conv2d_4"]
    assert all("weight" in note and "no two products overflow 16 bits" in note for note in said)


def test_copies_decide_alike_and_do_not_touch_the_original():
    prepared = calibrate(prepare_pt2e(capture(Shared().eval(), IMAGES[0]), auto()), IMAGES[:1])
    before = tops(prepared)
    twin = copy.deepcopy(prepared)
    owners = [o.agreement for o in twin.modules() if isinstance(o, PairedWeightObserver) and o.agreement]
    assert all(any(w is o for o in twin.modules()) for a in owners for w in (*a.weights, *a.activations))
    assert tops(twin) == before
    calibrate(twin, [(40 * IMAGES[1][0] ** 3,)])
    assert tops(prepared) == before
    a, b = convert_pt2e(prepared), convert_pt2e(prepared)
    assert torch.equal(a(*IMAGES[2]), b(*IMAGES[2]))


def test_statistics_of_a_checkpoint_give_the_same_choice():
    gm = capture(Shared().eval(), IMAGES[0])
    prepared = calibrate(prepare_pt2e(gm, auto()), IMAGES)
    fresh = prepare_pt2e(gm, auto())
    fresh.load_state_dict(prepared.state_dict())
    assert tops(fresh) == tops(prepared)
    assert torch.equal(convert_pt2e(fresh)(*IMAGES[0]), convert_pt2e(prepared)(*IMAGES[0]))


def test_dynamic_activations_have_a_range_beforehand():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = (torch.randn(4, 64),)
    result = quantize(model, x, auto(is_dynamic=True))
    for node in result.module.graph.nodes:
        if "choose_qparams" in str(node.target):
            assert node.args[2] == 255  # 12 standard deviations in 8 bits are coarser than gaussian weights
    assert sum("activations use 0..255" in note for note in result.report.notes) == 2
    assert all(not may_overflow(b, 255) for b in result.module.buffers() if b.dtype is torch.int8)


def test_it_composes():
    model = Of(lambda m, i: m.head(m.e(i)), e=nn.Embedding(10, 32), head=nn.Linear(32, 4)).eval()
    ids = (torch.arange(6).view(2, 3),)
    result = quantize(model, ids, ComposableQuantizer([EmbeddingQuantizer(), auto()]), [ids])
    ((_, integers, top),) = constants(result.module)
    assert not may_overflow(integers, top)


# ---------------------------------------------------------------- with the real kernels


@pytest.mark.inductor
@pytest.mark.parametrize("policy", ["auto", "7-bit activations", "7-bit weights"])
def test_every_kernel_is_int8_and_exact(policy):
    torch.manual_seed(0)
    model = nn.Sequential(Shared(), nn.Flatten(), nn.Linear(6 * 64, 24)).eval()
    result = quantize(model, IMAGES[0], auto(policy), IMAGES)
    program = lowering.to_inductor(result, engines="onednn")
    assert program.report.leftovers == ()
    assert program.verification.sqnr_db > 50


# ---------------------------------------------------------------- integers that an algorithm chooses


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4), min_size=1, max_size=4),
    st.sampled_from(TOPS),
    st.integers(0, 99),
)
def test_integers_within_their_limits_fit(rows, top, seed):
    observer = PairedWeightObserver(
        dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_channel_symmetric, ch_axis=0
    )
    weight = torch.tensor(rows)
    assert observer.integer_limits(weight) is None
    observer.agreement = Agreement()
    observer.agreement.top = lambda: top
    observer(weight)
    scales = observer.scales(top)
    nearest = quantize_per_channel(weight, scales, torch.zeros(len(rows)), 0, -128, 127, torch.float32)
    low, high = observer.integer_limits(nearest)
    assert bool((low <= nearest).all())
    assert bool((nearest <= high).all())
    generator = torch.Generator().manual_seed(seed)
    for drawn in (low, high, low + (high - low) * torch.rand(weight.shape, generator=generator).round()):
        assert not may_overflow(drawn.clamp(-128, 127).to(torch.int8), top)


@pytest.mark.parametrize("algorithm", ["gptq", "fit_weight_ranges", {"round_adaptively": {"iterations": 20}}])
def test_algorithms_leave_room_for_two_products(algorithm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        model[0].weight[:, ::2] *= 3.0
    data = [torch.randn(16, 32) @ torch.randn(32, 32) for _ in range(4)]
    result = quantize(model, (data[0],), auto(), data, algorithms=[algorithm], min_sqnr_db=None)
    products = constants(result.module)
    assert len(products) == 2
    assert not any(may_overflow(weight, top) for _, weight, top in products)
