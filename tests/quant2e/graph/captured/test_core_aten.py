"""Core ATen: programs that were decomposed are captured, quantized and lowered as those that were not."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowering import to_executorch, to_inductor, to_onnx
from quant2e import capture, plan_of, prepare_pt2e, quantize
from quant2e.graph.captured.core_aten import compose_core_ops
from tests.quant2e.integer.test_graph import x86, xnnpack

aten = torch.ops.aten


class Call(nn.Module):
    """A function of inputs and of a module's parameters."""

    def __init__(self, function, module=None):
        super().__init__()
        self.function, self.m = function, module

    def forward(self, *inputs):
        return self.function(*inputs) if self.m is None else self.function(self.m, *inputs)


def decomposed(model, *inputs, shapes=None):
    """A program of core ATen, saved and loaded by torch."""
    program = torch.export.export(model.eval(), inputs, dynamic_shapes=shapes).run_decompositions()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def ops(gm):
    return [str(node.target).removeprefix("aten.") for node in gm.graph.nodes if node.op == "call_function"]


LINE, IMAGE, VOLUME = torch.randn(2, 4, 6), torch.randn(2, 4, 6, 6), torch.randn(2, 4, 3, 4, 4)
ROWS = torch.randn(2, 3, 4)


def norm(module):
    with torch.no_grad():
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2.0)
    return module


CASES = {
    "conv1d": (Call(lambda m, x: m(x), nn.Conv1d(4, 6, 3, dilation=2)), LINE, ["conv1d.default"]),
    "conv2d": (Call(lambda m, x: m(x), nn.Conv2d(4, 6, 3, 2, groups=2)), IMAGE, ["conv2d.default"]),
    "conv2d, same": (Call(lambda m, x: m(x), nn.Conv2d(4, 6, 3, padding="same")), IMAGE, ["conv2d.default"]),
    "conv3d": (Call(lambda m, x: m(x), nn.Conv3d(4, 6, 2, bias=False)), VOLUME, ["conv3d.default"]),
    "transposed 1d": (
        Call(lambda m, x: m(x), nn.ConvTranspose1d(4, 6, 3, 2, output_padding=1)),
        LINE,
        ["conv_transpose1d.default"],
    ),
    "transposed 2d": (
        Call(lambda m, x: m(x), nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2)),
        IMAGE,
        ["conv_transpose2d.input"],
    ),
    "transposed 3d": (Call(lambda m, x: m(x), nn.ConvTranspose3d(4, 6, 2)), VOLUME, ["conv_transpose3d.input"]),
    "batch norm": (Call(lambda m, x: m(x), norm(nn.BatchNorm2d(4, 1e-3))), IMAGE, ["batch_norm.default"]),
    "layer norm": (Call(lambda m, x: m(x), nn.LayerNorm(6, eps=1e-3)), IMAGE, ["layer_norm.default"]),
    "group norm": (Call(lambda m, x: m(x), nn.GroupNorm(2, 4, affine=False)), IMAGE, ["group_norm.default"]),
    "max pool": (Call(lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)), IMAGE, ["max_pool2d.default"]),
    "max pool 3d": (Call(lambda x: F.max_pool3d(x, 2, padding=1)), VOLUME, ["max_pool3d.default"]),
    "softmax": (Call(lambda x: F.softmax(x, -1) + F.log_softmax(x, 1)), IMAGE, ["softmax.int", "log_softmax.int"]),
    "adaptive pools": (
        Call(lambda x: F.adaptive_avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 1)),
        IMAGE,
        ["adaptive_avg_pool2d.default", "adaptive_avg_pool2d.default"],
    ),
    "adaptive pools 3d": (
        Call(lambda x: F.adaptive_avg_pool3d(x, 2) + F.adaptive_avg_pool3d(x, 1)),
        VOLUME,
        ["adaptive_avg_pool3d.default", "adaptive_avg_pool3d.default"],
    ),
    "linear": (Call(lambda m, x: m(x), nn.Linear(6, 5)), IMAGE, ["linear.default"]),
    "linear, no bias": (Call(lambda m, x: m(x), nn.Linear(6, 5, bias=False)), LINE, ["linear.default"]),
    "linear, rows": (Call(lambda m, x: m(x), nn.Linear(6, 5)), torch.randn(3, 6), ["linear.default"]),
    "bag": (
        Call(lambda m, x: m(x), nn.EmbeddingBag(9, 4, mode="max", padding_idx=1)),
        torch.tensor([[1, 2, 2], [3, 1, 4]]),
        ["embedding_bag.padding_idx"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ops_are_composed_and_compute_the_same(name):
    model, x, expected = CASES[name]
    program = decomposed(model, x)
    gm = capture(program, (x,))
    assert Counter(expected) <= Counter(ops(gm))
    assert not Counter(expected) & Counter(ops(program.module()))
    assert torch.equal(gm(x), program.module()(x))
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    assert compose_core_ops(gm) == 0


def test_numbers_as_operands_and_copies():
    class Written(nn.Module):
        def forward(self, x):
            x = aten.mul.Scalar(aten.permute_copy.default(x, [1, 0]), 2)
            return aten.view_copy.default(x, [2, 3]), aten._unsafe_index.Tensor(x, [torch.tensor([1, 0])])

    x = torch.randn(2, 3)
    gm = capture(Written(), (x,))
    assert {"permute.default", "mul.Tensor", "reshape.default", "index.Tensor"} <= set(ops(gm))
    assert all(torch.equal(a, b) for a, b in zip(gm(x), Written()(x), strict=True))


OTHERS = {
    "a pool whose places are read": (
        Call(lambda x: F.max_pool2d(x, 2, return_indices=True)[1]),
        IMAGE,
        "max_pool2d_with_indices.default",
    ),
    "a product of two inputs": (Call(lambda x: torch.mm(x, x.permute(1, 0))), torch.randn(3, 4), "mm.default"),
    "a product with a matrix as it is": (
        Call(lambda m, x: torch.mm(x, m.weight), nn.Linear(3, 4)), torch.randn(3, 4), "mm.default"),
    "a sum with factors": (
        Call(lambda m, x: torch.addmm(m.bias, x, m.weight.permute(1, 0), alpha=2), nn.Linear(3, 4)),
        torch.randn(2, 3),
        "addmm.default",
    ),
    "a mean of other axes": (Call(lambda x: F.relu(F.softmax(x, -1)).mean((2, 3), True)), IMAGE, "mean.dim"),
    "a mean in a graph that nobody decomposed": (Call(lambda x: x.mean((-1, -2), True)), IMAGE, "mean.dim"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_stays(name):
    model, x, op = OTHERS[name]
    gm = capture(decomposed(model, x), (x,))
    assert op in ops(gm)
    assert torch.equal(gm(x), model(x))


def test_copies_stay_where_a_view_would_see_a_write():
    class Written(nn.Module):
        def forward(self, x):
            y = x + 1
            z = aten.permute_copy.default(y, [1, 0])
            return z.add_(1), y

    x = torch.randn(2, 3)
    gm = capture(Written(), (x,))
    assert "permute_copy.default" in ops(gm)
    assert all(torch.equal(a, b) for a, b in zip(gm(x), Written()(x), strict=True))


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(4, 8, 3, padding=1, bias=False), norm(nn.BatchNorm2d(8))
        self.b, self.nb = nn.ConvTranspose2d(8, 8, 2, 2), norm(nn.BatchNorm2d(8))
        self.c, self.nc, self.d = nn.Linear(8, 6), norm(nn.BatchNorm1d(6)), nn.Linear(6, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.na(self.a(x))) + 1.0, 2)
        x = F.adaptive_avg_pool2d(F.relu(self.nb(self.b(x))), 1).view(x.shape[0], 8)
        return F.softmax(self.d(F.relu(self.nc(self.c(x)))), -1)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.n, self.a, self.b = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(12, 4, bias=False)

    def forward(self, x):
        return x + self.b(F.gelu(self.a(self.n(x))))


NETS = {"image": (Image, torch.randn(4, 4, 6, 6)), "text": (Text, torch.randn(3, 5, 4))}
QUANTIZERS = {"xnnpack": xnnpack, "x86": x86, "dynamic": lambda: xnnpack(is_dynamic=True)}


def both(net):
    """A net captured both ways, and its input."""
    torch.manual_seed(0)
    make, x = NETS[net]
    model = make().eval()
    return capture(model, (x,)), capture(decomposed(model, x), (x,)), x


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("net", NETS)
def test_the_plan_is_that_of_the_net_as_it_was_exported(net, quantizer):
    exported, core, x = both(net)
    plans = [str(plan_of(prepare_pt2e(gm, QUANTIZERS[quantizer]()))) for gm in (exported, core)]
    assert plans[0] == plans[1]
    results = [quantize(gm, (x,), QUANTIZERS[quantizer](), [x, x + 0.1]) for gm in (exported, core)]
    assert torch.equal(results[0](x), results[1](x))
    assert [v.quantized for v in results[0].report.verdicts] == [v.quantized for v in results[1].report.verdicts]


@pytest.mark.parametrize("net", NETS)
def test_the_xnnpack_program_computes_it(net):
    _, core, x = both(net)
    program = to_executorch(quantize(core, (x,), xnnpack(), [x, x + 0.1]))
    assert program.report.verification is not None
    assert not [left for left in program.report.leftovers if "conv" in left.op or "linear" in left.op]


@pytest.mark.parametrize("net", NETS)
def test_the_onnx_program_computes_it(net, tmp_path):
    _, core, x = both(net)
    quantized = quantize(core, (x,), xnnpack(), [x, x + 0.1])
    torch.testing.assert_close(to_onnx(quantized, path=tmp_path / "core.onnx")(x), quantized(x), rtol=0, atol=1e-3)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_the_inductor_program_computes_it(net):
    _, core, x = both(net)
    quantized = quantize(core, (x,), x86(), [x, x + 0.1])
    program = to_inductor(quantized)
    torch.testing.assert_close(program(x), quantized(x), rtol=0, atol=1e-3)


def test_sizes_that_vary_stay_so():
    batch, length = torch.export.Dim("batch", min=2, max=9), torch.export.Dim("length", min=2, max=9)
    program = decomposed(Text(), ROWS, shapes=({0: batch, 1: length},))
    gm = capture(program, (ROWS,))
    assert ops(gm).count("linear.default") == 2
    assert not [op for op in ops(gm) if op.startswith("view")]
    other = torch.randn(7, 2, 4)
    assert torch.equal(gm(other), program.module()(other))


def test_what_is_written_so_beside_whole_ops_stays():
    """Quantizers of other libraries look for it by its name."""
    graph = capture(Call(lambda m, x: torch._softmax(m(x), -1, False), nn.Linear(6, 4)).eval(), (torch.randn(2, 6),))
    assert torch.ops.aten._softmax.default in {node.target for node in graph.graph.nodes}
