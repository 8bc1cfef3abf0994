"""Test vectors: written, listed, and enough to check a kernel that knows nothing of torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quant2e import Quant2eError, capture, quantize
from quant2e.graph.qdq_ops import qd
from quant2e.integer import dump_vectors, integer_report, to_integer
from quant2e.integer.ops import pooling
from tests.quant2e.integer.graphs import MODES, Draw, Writer, aten
from tests.quant2e.integer.numpy_kernels import check
from tests.quant2e.integer.test_graph import Net, X, x86, xnnpack


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return quantize(Net().eval(), (X,), xnnpack(), [X])


@pytest.mark.parametrize("mode", [m for m in MODES if m != "power_of_two"])
def test_a_network_is_checked_by_numpy_kernels(network, mode, tmp_path):
    gm = to_integer(network.module, requantization=mode, strict=True)
    assert check(dump_vectors(gm, X, tmp_path)) == {"convolution": 2, "sum": 1, "average": 1, "linear": 1}


@pytest.mark.parametrize("mode", MODES)
def test_other_kinds_are_checked_by_numpy_kernels(mode, tmp_path):
    draw = Draw(MODES.index(mode))
    a, b, c, out = (draw.grid() for _ in range(4))
    writer = Writer()
    x, y = writer.input(draw.integers([4, 6], a), a), writer.input(draw.integers([6, 4], b), b)
    z = writer.dq(writer.q(writer.op(aten.matmul.default, x, y), c), c)
    squared = writer.dq(writer.q(writer.op(aten.mul.Tensor, z, z), c), c)
    other = writer.dq(writer.q(writer.op(aten.sigmoid.default, z), out), out)
    limited = writer.op(aten.hardtanh.default, z, -c.scale, c.scale)
    joined = writer.op(aten.cat.default, [squared, other, limited], 1)
    index = torch.tensor([0, 2, 1])
    table = writer.op(
        aten.embedding.default, writer.weight(draw.weight([3, 4]), draw.scales(3), 0), writer.plain(index)
    )
    gm = to_integer(writer.finish(writer.q(joined, c), writer.q(table, out)), requantization=mode, strict=True)
    found = check(dump_vectors(gm, tuple(writer.inputs), tmp_path))
    expected = {"matmul": 1, "mul": 1, "table": 1, "clamp": 1, "cat": 1, "lookup": 1}
    if (out.scale, out.zero_point, out.low, out.dtype) != (c.scale, c.zero_point, c.low, c.dtype):
        expected["requantize"] = 1
    assert found == expected


@pytest.mark.parametrize("mode", MODES)
def test_products_in_groups_and_transposed_are_checked_by_numpy_kernels(mode, tmp_path):
    """Several groups, one, and transposed convolutions: in groups, with holes, with more than one zero point."""
    draw = Draw(MODES.index(mode))
    a, b, out = draw.grid(), draw.grid(), draw.grid()
    writer = Writer()
    x, image = writer.input(draw.integers([2, 5, 12], a), a), writer.input(draw.integers([2, 4, 3, 5], b), b)
    results = []
    for groups in (3, 1):
        parts = [draw.weight([6, 12], -8, 7), draw.scales(6 * groups).reshape(6, groups), torch.zeros(6, groups).long()]
        weight = writer.op(
            qd.dequantize_per_channel_group.default, *map(writer.constant, parts), -8, 7, torch.int8, 12 // groups,
            torch.float32,
        )  # fmt: skip
        bias = writer.constant(torch.from_numpy(draw.rng.normal(0, 0.1, 6)).float())
        results.append(writer.op(aten.linear.default, x, weight, bias))
    for groups, more in ((1, ([2, 1], [1, 0], [1, 0])), (2, ([1, 2], [0, 1], [0, 1]))):
        weight = writer.weight(draw.weight([4, 3, 3, 2]), draw.scales(3), 1, torch.tensor([3, -5, 0]))
        bias = writer.constant(torch.from_numpy(draw.rng.normal(0, 0.1, 3 * groups)).float())
        results.append(writer.op(aten.conv_transpose2d.input, image, weight, bias, *more, groups, [2, 2]))
    gm = to_integer(writer.finish(*(writer.q(y, out) for y in results)), requantization=mode, strict=True)
    assert check(dump_vectors(gm, tuple(writer.inputs), tmp_path)) == {"grouped_linear": 2, "convolution": 2}


@pytest.mark.parametrize("mode", [m for m in MODES if m != "power_of_two"])
def test_averages_over_what_varies_and_bags_are_checked_by_numpy_kernels(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(pooling, "_static", lambda sizes: None)
    draw = Draw(MODES.index(mode))
    a, out = draw.grid(), draw.grid()
    writer = Writer()
    x = writer.input(draw.integers([2, 3, 6, 7], a), a)
    index, offsets = writer.plain(torch.tensor([4, 1, 1, 0, 3])), writer.plain(torch.tensor([0, 2, 2]))
    table = writer.weight(draw.weight([5, 3]), draw.scales(5), 0)
    results = [
        writer.op(aten.mean.dim, x, [2, 3], True),
        writer.op(aten.adaptive_avg_pool2d.default, x, [4, 3]),
        writer.op(aten.avg_pool2d.default, x, [3, 2], [2, 2], [1, 1], True, False),
        *(
            writer.pick(writer.op(aten.embedding_bag.default, table, index, offsets, False, kind), 0)
            for kind in (0, 1)  # sum, mean
        ),
    ]
    gm = to_integer(writer.finish(*(writer.q(y, out) for y in results)), requantization=mode, strict=True)
    assert check(dump_vectors(gm, tuple(writer.inputs), tmp_path)) == {"quotient": 4, "bag": 1}


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_fused_activations_biases_between_integers_and_float_answers_are_checked_by_numpy_kernels(is_dynamic, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(5, 12)
    quantized = quantize(Text().eval(), (x,), x86(is_dynamic=is_dynamic), [x])
    gm = to_integer(quantized.module, requantization="fixed_point", strict=True)
    found = check(dump_vectors(gm, x, tmp_path))
    if is_dynamic:
        assert found == {"dynamic_linear": 2}
    else:
        assert found == {"linear": 1, "thresholds": 1, "float_linear": 1}
        bits = [r.attributes["bias_fraction_bits"] for r in integer_report(gm).records if r.kind.endswith("linear")]
        assert all(8 <= b <= 16 for b in bits)


@pytest.mark.parametrize("bias", [False, True])
def test_dynamic_products_in_groups_are_checked_by_numpy_kernels(bias, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    quantized = quantize(nn.Linear(64, 5, bias=bias).eval(), (x,), xnnpack(is_dynamic=True, group_size=32))
    gm = to_integer(quantized.module, strict=True)
    assert check(dump_vectors(gm, x, tmp_path)) == {"dynamic_grouped_linear": 1}


def test_the_page_for_hardware_engineers_runs(tmp_path, monkeypatch, capsys):
    """The code of docs/hardware_engineer.md, block by block, on a model of its reader."""
    page = (Path(__file__).parents[3] / "docs" / "hardware_engineer.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10), nn.ReLU(), nn.Linear(10, 4))
    inputs = torch.randn(2, 3, 8, 8)
    names = {"model": model.eval(), "example_inputs": (inputs,), "calibration_data": [inputs]}
    for block in blocks:
        exec(compile(block, "hardware_engineer.md", "exec"), names)
    listing = json.loads((tmp_path / "vectors" / "vectors.json").read_text())
    assert [op["kind"] for op in listing["ops"]] == ["convolution", "linear", "linear"]
    assert "x the limit" in capsys.readouterr().out
    # the loop of the page is a check: it fails on a wrong number
    file = tmp_path / "vectors" / next(op["file"] for op in listing["ops"] if op["kind"] == "linear")
    arrays = dict(np.load(file))
    arrays["out"][0, 0] ^= 1
    np.savez(file, **arrays)
    with pytest.raises(AssertionError):
        exec(compile(blocks[2], "hardware_engineer.md", "exec"), names)


def test_a_wrong_kernel_is_caught(network, tmp_path):
    gm = to_integer(network.module)
    index = dump_vectors(gm, X, tmp_path)
    entry = json.loads(index.read_text())["ops"][0]
    arrays = dict(np.load(tmp_path / entry["file"]))
    arrays["out"] = arrays["out"] + np.int8(1)
    np.savez(tmp_path / entry["file"], **arrays)
    with pytest.raises(AssertionError, match="conv2d"):
        check(index)


def test_the_listing_says_what_is_in_each_file(network, tmp_path):
    gm = to_integer(network.module)
    dump_vectors(gm, X, tmp_path)
    listing = json.loads((tmp_path / "vectors.json").read_text())
    assert (listing["format"], listing["requantization"]) == (1, "float32")
    assert [op["name"] for op in listing["ops"]] == [r.name for r in integer_report(gm).records]
    first = listing["ops"][0]
    assert (first["name"], first["kind"], first["file"]) == ("conv2d", "convolution", "000_conv2d_convolution.npz")
    assert first["arrays"] == {
        "in_x": {"shape": [4, 3, 8, 8], "dtype": "int8"},
        "const_weight": {"shape": [8, 3, 3, 3], "dtype": "int8"},
        "const_bias": {"shape": [8], "dtype": "int32"},
        "const_ratio": {"shape": [8], "dtype": "float32"},
        "out": {"shape": [4, 8, 8, 8], "dtype": "int8"},
        "accumulator": {"shape": [4, 8, 8, 8], "dtype": "int32"},
    }
    reads = {name for op in listing["ops"] for name in op["reads"].values()}
    writes = {op["writes"] for op in listing["ops"]}
    assert len(reads & writes) >= 4  # ops of the list feed each other


def test_what_cannot_be_dumped_is_refused(network, tmp_path):
    with pytest.raises(Quant2eError, match="has no integer report"):
        dump_vectors(capture(Net().eval(), (X,)), X, tmp_path)
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(Quant2eError, match="is a file; give a folder"):
        dump_vectors(to_integer(network.module), X, occupied)
