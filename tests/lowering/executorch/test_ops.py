"""Float ops that XNNPACK has no kernel for, written in terms of its kernels: one delegate, and the same numbers."""

import pytest
import torch
from torch import nn

from lowering import to_executorch
from lowering.executorch.xnnpack.legalize import EXACT, legalize
from tests.lowering.graphs import Weight, on_grid

pytest.importorskip("executorch")

F = torch.nn.functional
IMAGE = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))


class Fn(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def in_place(x):
    y = x * 2
    y += 1
    return F.hardsigmoid(y.relu_())


SLOPES, GAIN = torch.rand(8), torch.rand(16)
CHANNEL_GAIN = torch.rand(8)
OPS = {
    "in place": lambda x, t: in_place(x),
    "hardsigmoid": lambda x, t: F.hardsigmoid(x),
    "gelu of tanh": lambda x, t: F.gelu(x, approximate="tanh"),
    "elu": lambda x, t: F.elu(x, 0.7),
    "prelu": lambda x, t: F.prelu(x, SLOPES),
    "softplus": lambda x, t: F.softplus(x * 30),
    "mish": lambda x, t: F.mish(x),
    "softmax over channels": lambda x, t: F.softmax(x, 1),
    "rms_norm": lambda x, t: F.rms_norm(t, [16], GAIN),
    "rms_norm by hand": lambda x, t: t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6),
    "group_norm": lambda x, t: F.group_norm(x, 2, CHANNEL_GAIN, CHANNEL_GAIN),
    "instance_norm": lambda x, t: F.instance_norm(x),
    "layer_norm over an image": lambda x, t: F.layer_norm(x, [8, 6, 6]),
    "mean over the last": lambda x, t: t.mean(-1),
    "mean over the middle": lambda x, t: t.mean(1),
    "sum": lambda x, t: t.sum(-1, keepdim=True),
    "var": lambda x, t: t.var(-1, unbiased=False),
    "std": lambda x, t: t.std(1, keepdim=True),
    "normalize": lambda x, t: F.normalize(t, dim=-1),
    "gelu by hand": lambda x, t: 0.5 * t * (1 + torch.tanh(0.79788456 * (t + 0.044715 * t**3))),
    "numbers on the left": lambda x, t: 1 - 2 / (x.abs() + 1),
    "matmul": lambda x, t: x @ x.transpose(-1, -2),
    "split": lambda x, t: torch.cat(x.split([2, 6], 1)[::-1], 1),
    "chunk": lambda x, t: x.chunk(2, 1)[0] + x.chunk(2, 1)[1],
    "stack": lambda x, t: torch.stack([t, t + 1], 1),
    "roll": lambda x, t: torch.roll(x, (1, -2), (2, 3)),
    "avg_pool2d with padding": lambda x, t: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool1d": lambda x, t: F.avg_pool1d(t, 2),
    "max_pool1d": lambda x, t: F.max_pool1d(t, 3, 2, 1),
    "adaptive_avg_pool1d": lambda x, t: F.adaptive_avg_pool1d(t, 1),
    "nearest": lambda x, t: F.interpolate(x, scale_factor=(2, 3)),
    "nearest, by no whole factor": lambda x, t: F.interpolate(x, size=(7, 9)),
    "flip": lambda x, t: t.flip(1),
    "index": lambda x, t: x[:, [5, 2, 3]],
    "step": lambda x, t: x[:, :, ::2],
    "repeat": lambda x, t: t.repeat(1, 2, 1),
    "reflect": lambda x, t: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "replicate": lambda x, t: F.pad(t, (1, 2), mode="replicate"),
    "circular": lambda x, t: F.pad(x, (1, 1, 1, 1), mode="circular"),
}


@pytest.mark.slow
def test_float_ops_are_one_delegate():
    fn = Fn(lambda x, t: tuple(op(x, t) for op in OPS.values()))
    program = to_executorch(torch.export.export(fn, (IMAGE, TOKENS), strict=False).module(), (IMAGE, TOKENS))
    assert program.report.leftovers == ()
    assert len(program.report.partitions) == 1
    for name, got, expected in zip(OPS, program(IMAGE, TOKENS), fn(IMAGE, TOKENS), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5, msg=lambda text, op=name: f"{op}: {text}")


@pytest.mark.parametrize("name", OPS)
def test_rewrites_keep_the_result(name):
    fn = Fn(OPS[name])
    exported = torch.export.export(fn, (IMAGE, TOKENS), strict=False).run_decompositions({})
    module = exported.module()
    assert legalize(module, EXACT), f"{name} is left as it is"
    expected = fn(IMAGE, TOKENS)
    torch.testing.assert_close(module(IMAGE, TOKENS), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "op",
    [
        lambda x, t: F.gelu(x),
        lambda x, t: F.softmax(x, -1),
        lambda x, t: x.double().mean(-1),
        lambda x, t: t.sum(),
        lambda x, t: x.roll(5),
    ],
    ids=["gelu", "softmax over the last", "float64", "a sum of everything", "places that depend on each other"],
)
def test_what_has_a_kernel_or_no_equivalent_is_left_alone(op):
    exported = torch.export.export(Fn(op), (IMAGE, TOKENS), strict=False)
    module = exported.module()
    before = [node.target for node in module.graph.nodes]
    assert legalize(module, EXACT) == {}
    assert [node.target for node in module.graph.nodes] == before


@pytest.mark.parametrize(
    "turned",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x.swapaxes(1, 2),
        lambda x: x.movedim(1, 2),
        lambda x: x.mT,
        lambda x: torch.ops.aten.transpose_copy.int(x, 1, 2),
        lambda x: x.transpose(1, 2).detach().narrow(1, 0, 16),
    ],
)
def test_an_axis_is_moved_as_integers_however_that_is_spelled(turned):
    linear = Weight(torch.randn(4, 5))
    fn = Fn(lambda x, t: F.linear(turned(on_grid(t, (0.03, 0))), linear()))
    module = torch.export.export(fn, (IMAGE, TOKENS), strict=False).module()
    expected = module(IMAGE, TOKENS)
    assert legalize(module, EXACT)["quantize_moves"] >= 1
    assert torch.equal(module(IMAGE, TOKENS), expected)
    (product,) = (node for node in module.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert "dequantize" in str(product.args[0].target)


# --------------------------------------------------------------------------------------------- fused projections


class Fused(nn.Module):
    """Query, key and value by one product, taken apart in one of three ways; int8 weights or float."""

    def __init__(self, way, quantized):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.weight = Weight(torch.randn(24, 8) * 0.3) if quantized else nn.Parameter(torch.randn(24, 8))
        self.bias = nn.Parameter(torch.randn(24))

    def forward(self, x):
        weight = self.weight() if isinstance(self.weight, nn.Module) else self.weight
        y = F.linear(x, weight, self.bias)
        if self.way == "chunk":
            q, k, v = y.chunk(3, -1)
        elif self.way == "view":
            q, k, v = y.view(*y.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = y[..., :8], y[..., 8:16], y[..., 16:]
        return q * k + v


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8 weights"])
@pytest.mark.parametrize("way", ["chunk", "view", "slice"])
def test_fused_projections_come_apart_where_a_size_is_dynamic(way, quantized):
    x, fused = torch.randn(2, 5, 8), Fused(way, quantized)
    length = torch.export.Dim("length", min=2, max=9)
    module = torch.export.export(fused, (x,), dynamic_shapes=({1: length},), strict=False).module()
    assert legalize(module, EXACT)["split_projections"] == 3
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert names.count("aten.linear.default") == 3
    assert not any("slice" in name or "select" in name for name in names)
    for size in (2, 9):
        y = torch.randn(2, size, 8)
        torch.testing.assert_close(module(y), fused(y))
    still = torch.export.export(fused, (x,), strict=False).module()
    assert "split_projections" not in legalize(still, EXACT)


def test_a_quantized_split_stays_between_integers():
    def split(x):
        q, k = (on_grid(part, (0.05, 0)) for part in on_grid(x, (0.05, 0)).split([3, 5], 1))
        return on_grid(torch.cat([k, q], 1), (0.05, 0))

    program = to_executorch(torch.export.export(Fn(split), (IMAGE,), strict=False).module(), (IMAGE,))
    assert len(program.report.partitions) == 1
    assert program.report.leftovers == ()
    assert torch.equal(program(IMAGE), split(IMAGE))
