"""Transformers in regions: attention as models write it, norms, and whole layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowering
import quant2e
from lowering.native.kernels.op import load_region_op
from lowering.native.kernels.plan import StepKind, region_plan
from quantizers import X86InductorQuantizer, get_default_x86_inductor_quantization_config

pytestmark = pytest.mark.skipif(load_region_op() is None, reason="no C++ compiler")

WIDTH, HEADS, SIZE, ROWS = 96, 4, 24, 19


class Layer(nn.Module):
    """An encoder layer. ``way``: how it writes attention; ``shares``: heads of k and v; ``first``: norms come first."""

    def __init__(self, way: str, *, shares: int = HEADS, first: bool = False, masked: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.shares, self.first, self.masked = way, shares, first, masked
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, shares * SIZE), nn.Linear(WIDTH, shares * SIZE)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], ROWS, -1, SIZE).transpose(1, 2)

    def attention(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        if self.shares != HEADS:
            k, v = (
                y[:, :, None].expand(-1, -1, HEADS // self.shares, -1, -1).reshape(x.shape[0], HEADS, ROWS, SIZE)
                for y in (k, v)
            )
        if self.way == "fused":
            y = F.scaled_dot_product_attention(q, k, v, mask if self.masked else None)
        elif self.way == "causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.way == "scaled q":
            y = F.softmax(torch.matmul(q * SIZE**-0.5, k.transpose(2, 3)), dim=-1) @ v
        else:
            scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(SIZE)
            y = torch.matmul(F.dropout(F.softmax(scores + mask, dim=-1), 0.1, self.training), v)
        return self.o(y.transpose(1, 2).contiguous().view(x.shape[0], ROWS, WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.first:
            x = x + self.attention(self.one(x), mask)
            return x + self.down(F.gelu(self.up(self.two(x))))
        x = self.one(self.attention(x, mask) + x)
        y: Tensor = self.two(self.down(F.gelu(self.up(x))) + x)
        return y


class Torchs(nn.Module):
    """torch's own attention, which puts rows first and cuts q, k and v out of one product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(x)))


class Flat(nn.Module):
    """As GPT-2: products on rows of all samples, a mask of booleans, and gelu spelled out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down, self.norm = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH)
        self.register_buffer("mask", torch.ones(ROWS, ROWS, dtype=torch.bool).tril())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n = x.shape[0]
        q, k, v = self.all(self.norm(x).view(-1, WIDTH)).view(n, ROWS, 3 * WIDTH).split(WIDTH, 2)
        q, k, v = (y.view(n, ROWS, -1, SIZE).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).reshape(n, ROWS, WIDTH)
        x = self.o(y.view(-1, WIDTH)).view(n, ROWS, WIDTH) + x
        z = self.up(x.view(-1, WIDTH)).view(n, ROWS, 64)
        z = 0.5 * z * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))
        return x + self.down(z.view(-1, 64)).view(n, ROWS, WIDTH)


def inputs(samples: int = 2) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(samples, 1, 1, ROWS)
    mask[:, :, :, ROWS - 3 :] = torch.finfo(torch.float32).min
    return torch.randn(samples, ROWS, WIDTH), mask


def quantized(model: nn.Module, products: object = None, **more: object) -> quant2e.QuantizedModel:
    """``products``: functions of attention that are quantized by name."""
    torch.manual_seed(1)
    batches = [inputs() for _ in range(3)]
    config = get_default_x86_inductor_quantization_config()
    quantizer = X86InductorQuantizer().set_global(config)
    if products is not None:
        quantizer.set_function_type_qconfig(products, config)
    return quant2e.quantize(model.eval(), inputs(), quantizer, calibration_data=batches, progress=False, **more)


@pytest.mark.parametrize(
    "layer",
    [
        Layer("eager"),
        Layer("fused"),
        Layer("fused", masked=False),
        Layer("causal"),
        Layer("scaled q"),
        Layer("eager", shares=2),
        Layer("fused", shares=1),
        Layer("eager", first=True),
    ],
    ids=lambda layer: f"{layer.way} {layer.shares} {layer.first} {layer.masked}",
)
def test_a_layer_is_one_region_within_a_step_of_its_graph(layer):
    program = lowering.to_native(quantized(layer), verify_inputs=[inputs() for _ in range(2)])
    assert [region.steps for region in program.report.regions] == [9 if layer.first else 10]
    assert program.report.leftovers == ()
    assert program.verification is not None
    assert program.verification.sqnr_db > 55
    assert program.verification.max_steps < 1.01


@pytest.mark.parametrize(
    ("layer", "products", "bytes_of"),
    [
        (Layer("eager"), torch.matmul, ("x", "other", "third")),
        (Layer("fused"), F.scaled_dot_product_attention, ("x", "other")),
        (Layer("causal", shares=2), F.scaled_dot_product_attention, ("x", "other")),
    ],
    ids=["both products", "scores", "shared heads"],
)
def test_products_of_attention_on_integers(layer, products, bytes_of, monkeypatch):
    """Queries, keys and values are quantized where their linear layers write them, and stay bytes."""
    plans = []

    def planned(values, steps, *rest):
        plans.append((values, steps))
        return region_plan(values, steps, *rest)

    monkeypatch.setattr("lowering.native.regions.region_plan", planned)
    program = lowering.to_native(quantized(layer, products), verify_inputs=[inputs() for _ in range(2)])
    assert len(program.report.regions) == 1
    assert program.verification is not None
    assert program.verification.sqnr_db > 45
    ((values, steps),) = plans
    (attention,) = (step for step in steps if step.kind is StepKind.ATTENTION)
    read = {name: values[getattr(attention, name)] for name in ("x", "other", "third")}
    assert tuple(name for name, value in read.items() if not value.floats) == bytes_of


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("model", [Torchs(), Flat()], ids=["MultiheadAttention", "GPT-2"])
def test_rows_are_straightened(model, dynamic):
    program = lowering.to_native(quantized(model, dynamic_batch=dynamic), verify_inputs=[inputs(3)] if dynamic else ())
    assert [region.steps for region in program.report.regions] == [6]
    assert program.report.leftovers == ()
    assert program.verification is not None
    assert program.verification.sqnr_db > 55


def test_any_batch_and_number_of_threads_give_the_same_bits(torch_threads):
    program = lowering.to_native(quantized(Layer("eager"), dynamic_batch=True))
    x, mask = inputs(5)
    found = []
    for threads in (1, 2, 3):
        torch_threads(threads)
        found += [program(x, mask), torch.cat([program(x[i : i + 1], mask[i : i + 1]) for i in range(5)])]
    assert all(torch.equal(one, found[0]) for one in found)


def test_one_mask_serves_all_samples():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer("eager")
            self.register_buffer("mask", torch.full((1, 1, ROWS, ROWS), -1e9).triu(1))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.layer(x, self.mask)
            return y

    program = lowering.to_native(quantized(Shared(), dynamic_batch=True), verify_inputs=[inputs(3)])
    assert len(program.report.regions) == 1
    assert program.verification is not None
    assert program.verification.sqnr_db > 55
