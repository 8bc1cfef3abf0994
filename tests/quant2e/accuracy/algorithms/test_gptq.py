"""GPTQ: the integers it chooses are those that conversion writes, and they recover what rounding to nearest loses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from quant2e.accuracy.algorithms.gptq import GPTQ, gptq
from quant2e.accuracy.output_error import output_sqnr
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.observers.given import integers_given
from quant2e.observers.measuring import PerChannelMinMaxObserver
from quant2e.observers.placeholder import FixedQParamsObserver
from quantizers.x86 import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from tests.quant2e.accuracy.algorithms.rounded import (
    QUANTIZERS,
    Small,
    check_conversion,
    ids,
    prepared,
    weights_only,
)


@pytest.mark.parametrize(
    "name", [n if n != "torchao's x86" else pytest.param(n, marks=pytest.mark.slow) for n in QUANTIZERS]
)
def test_conversion_writes_what_was_chosen(name, tmp_path):
    before = prepared(QUANTIZERS[name]())
    parameters = {n: p.detach().clone() for n, p in before.named_parameters()}
    after = gptq(before, ids(4))
    converted = check_conversion(before, after, ids(1, 7)[0])
    assert all(torch.equal(p, parameters[n]) for n, p in before.named_parameters())
    assert any("dB, to nearest" in note for note in quant2e.report_of(converted).notes)
    quant2e.save(converted, tmp_path / "model.pt2", (ids(1)[0],))
    again = quant2e.load(tmp_path / "model.pt2")
    assert torch.equal(again(ids(1, 8)[0]), converted(ids(1, 8)[0]))


class Layer(nn.Module):
    """A transformer's layer, over inputs of which a few directions have most of the power."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nn.functional.gelu(self.up(self.other(x))))


class Language(nn.Module):
    """A character model."""

    def __init__(self, characters: int = 24, width: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(characters, width)
        self.layers = nn.Sequential(Layer(width), Layer(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.table(ids))))


def text(count: int, seed: int) -> torch.Tensor:
    """Lines of a language in which a character follows from the two before it."""
    generator = torch.Generator().manual_seed(seed)
    lines = torch.randint(0, 24, (count, 24), generator=generator)
    for i in range(2, 24):
        noise = torch.randint(0, 24, (count,), generator=generator)
        follows = (3 * lines[:, i - 1] + lines[:, i - 2] ** 2) % 24
        lines[:, i] = torch.where(torch.rand(count, generator=generator) < 0.1, noise, follows)
    return lines


def lost(exact, model, batches: list[torch.Tensor]) -> float:
    """What a model's predictions lose of the exact ones: their divergence in nats a token, which noise only adds to."""
    with torch.no_grad():
        pairs = [[m(x)[:, 1:-1].flatten(0, 1).log_softmax(-1) for m in (model, exact)] for x in batches]
    return float(torch.stack([nn.functional.kl_div(*p, log_target=True, reduction="batchmean") for p in pairs]).mean())


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = Language()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        lines = text(32, step)
        loss = nn.functional.cross_entropy(model(lines)[:, 1:-1].flatten(0, 1), lines[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w4-g32", "w4-g32-asym", "w4"])
def test_it_recovers_half_of_what_nearest_loses(trained, recipe):
    data = [text(32, 1000 + i) for i in range(8)]
    unseen = [text(32, 9999 + i) for i in range(8)]
    before = prepared(X86InductorQuantizer().set_global(recipe), trained, data)
    after = gptq(before, data)
    nearest, ours = quant2e.convert_pt2e(before), quant2e.convert_pt2e(after)
    # Noise at the output: half of it is 3 dB.
    assert output_sqnr(trained, ours, unseen) > output_sqnr(trained, nearest, unseen) + 3.5
    assert 0 < lost(trained, ours, unseen) < 0.5 * lost(trained, nearest, unseen)


class Tied(nn.Module):
    """A head that is the table, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 32), nn.Linear(32, 20, bias=False)
        self.head.weight = self.table.weight
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(torch.relu(self.one(self.table(ids)))))


def test_tied_weights_get_the_same_integers():
    before = prepared(X86InductorQuantizer().set_global("w4-g32"), Tied())
    after = gptq(before, ids(4))
    check_conversion(before, after, ids(1, 5)[0])
    given = [integers_given(after, node) for node in after.graph.nodes if node.op == "call_module"]
    square = [q for q in given if q is not None and q.shape == (32, 32)]
    assert len(square) in (1, 2)
    assert all(torch.equal(q, square[0]) for q in square)
    assert "embedding" not in "".join(n for n in quant2e.report_of(after).notes if n.startswith("gptq"))


def test_each_layer_sees_the_rounded_ones_before_it():
    before = prepared(X86InductorQuantizer().set_global("w4-g32"))
    model = Small().eval()
    unseen = ids(6, 99)
    torch.manual_seed(0)
    model = Small().eval()
    nearest, ours = (output_sqnr(model, quant2e.convert_pt2e(g), unseen) for g in (before, gptq(before, ids(8))))
    assert ours > nearest


def test_scales_that_were_chosen_or_are_shared_stay():
    before = prepared(weights_only(PerChannelMinMaxObserver))
    once = gptq(before, ids(2))
    twice = gptq(once, ids(2), damping=0.5)
    scales = [[o.scale for o in g.modules() if isinstance(o, FixedQParamsObserver)] for g in (once, twice)]
    assert len(scales[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*scales, strict=True))


class Branch(nn.Module):
    """A linear layer in a branch, and one that only zeros reach."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.silent, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cond(x.sum() > 0, self.inside, lambda x: x * 1.0, [x])
        return self.last(y + self.silent(torch.relu(-x.abs())))


def test_what_is_left_has_a_reason():
    data = [torch.randn(4, 32) for _ in range(3)]
    before = prepared(weights_only(PerChannelMinMaxObserver), Branch(), data)
    notes = quant2e.report_of(gptq(before, data)).notes
    assert any("zero throughout" in note for note in notes)
    assert any("body" in note for note in notes)


def test_bad_input_is_refused():
    before = prepared(X86InductorQuantizer().set_global("w4-g32"))
    with pytest.raises(CalibrationError, match="at least one batch"):
        gptq(before, [])
    with pytest.raises(Quant2eError, match="prepare_pt2e"):
        gptq(quant2e.convert_pt2e(before), ids(1))
    with pytest.raises(Quant2eError, match="not a Small"):
        gptq(Small(), ids(1))
    with pytest.raises(Quant2eError, match="damping"):
        GPTQ(damping=0.0)
    with pytest.raises(Quant2eError, match="block_size"):
        GPTQ(block_size=0)


def test_in_one_call():
    quantizer = X86InductorQuantizer().set_global("w4-g32")
    result = quant2e.quantize(
        Small().eval(), (ids(1)[0],), quantizer, ids(12), algorithms=[{"gptq": {"damping": 0.02}}]
    )
    (step,) = result.report.algorithms
    assert step.name == "gptq"


def test_weights_of_seven_bits_gain_where_one_column_owns_their_range():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        model[0].weight[:, 0] *= 20.0
    mix = torch.randn(6, 32)
    mix[:, 0] *= 0.05
    data = [torch.randn(64, 6) @ mix for _ in range(6)]
    quantizer = X86InductorQuantizer(isa="avx2").set_global(get_default_x86_inductor_quantization_config())
    (step,) = quant2e.quantize(model, (data[0],), quantizer, data, algorithms=["gptq"]).report.algorithms
    assert step.outcome == "kept"
    assert step.after_db >= step.before_db + 3.0
