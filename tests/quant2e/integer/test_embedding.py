"""Lookups and bags in integer tables against the slow model: no difference, in any arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quant2e import Quant2eError, integer_report, quantize, to_integer
from quant2e.graph.qdq_ops import qd
from quant2e.integer import dump_vectors
from quantizers import ComposableQuantizer, EmbeddingQuantizer, get_embedding_quantization_config
from tests.quant2e.integer import reference
from tests.quant2e.integer.graphs import CASES, Draw, Tally, Writer, aten, difference_from_qdq, run_integer
from tests.quant2e.integer.numpy_kernels import check
from tests.quant2e.integer.test_graph import Text, x86, xnnpack

SCHEMES = ("per tensor", "per row", "per group")


class Table:
    """A generated table: its integers and, for each of them, its scale and zero point."""

    def __init__(self, draw: Draw, scheme: str, low: float, high: float) -> None:
        rows, size = draw.int(1, 6), draw.int(2, 3) if scheme == "per group" else draw.int(1, 5)
        groups = draw.int(1, 4) if scheme == "per group" else 1
        self.scheme, self.size = scheme, size
        self.integers = draw.weight([rows, groups * size], *((-8, 7) if scheme == "per group" else (-127, 127)))
        lines = 1 if scheme == "per tensor" else rows
        self._scales = draw.scales(lines * groups, low, high).reshape(lines, groups)
        affine = draw.flag()
        zeros = [draw.int(-20, 20) if affine else 0 for _ in range(lines * groups)]
        self._zeros = torch.tensor(zeros).reshape(lines, groups)
        shape = self.integers.shape
        self.scale = np.broadcast_to(np.repeat(self._scales.numpy(), size, 1), shape)
        self.steps = self.integers.numpy().astype(np.int64) - np.repeat(self._zeros.numpy(), size, 1)

    def write(self, writer: Writer):
        """The dequantized table."""
        if self.scheme == "per group":
            parts = [writer.constant(t) for t in (self.integers, self._scales, self._zeros)]
            return writer.op(
                qd.dequantize_per_channel_group.default, *parts, -8, 7, torch.int8, self.size, torch.float32
            )
        if self.scheme == "per row":
            return writer.weight(self.integers, self._scales[:, 0], 0, self._zeros[:, 0])
        return writer.weight(self.integers, float(self._scales), None, int(self._zeros))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_embedding(scheme):
    for seed in range(CASES):
        draw = Draw(seed)
        table, grid = Table(draw, scheme, 2**-8, 2**-3), draw.grid()
        rows, width = table.integers.shape
        index = torch.from_numpy(draw.rng.integers(0, rows, [2, 3]))
        writer = Writer()
        node = writer.op(aten.embedding.default, table.write(writer), writer.plain(index))
        gm = to_integer(writer.finish(writer.q(node, grid), node), requantization=draw.mode, strict=True)
        assert all(str(n.target).startswith("aten.") for n in gm.graph.nodes if n.op == "call_function")
        lookup = gm.graph.output_node().args[0][0]  # one op, and its table is on the grid already
        assert (lookup.target, lookup.args[0].meta["val"].dtype) == (aten.embedding.default, grid.dtype)
        q, real = gm(index)
        for at in np.ndindex(2, 3, width):
            place = int(index[at[:2]]), at[2]
            value = np.float32(table.steps[place]) * table.scale[place]
            assert float(real[at]) == value, f"seed {seed} at {at}"
            assert int(q[at]) == grid.quantize(value), f"seed {seed} at {at}"
        assert torch.equal(q, writer.results[0])
        assert torch.equal(real, writer.results[1])


def bag_case(seed):
    draw = Draw(seed)
    draw.mode = ("float32", "fixed_point", "fixed_point_single_rounding")[seed % 3]
    return draw


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode, scheme):
    tally = Tally()
    for seed in range(CASES):
        draw = bag_case(seed)
        table, grid, n = Table(draw, scheme, 2**-9, 2**-7), draw.grid(), draw.int(3, 9)
        rows, width = table.integers.shape
        index = torch.from_numpy(draw.rng.integers(0, rows, [n]))
        offsets = torch.tensor([0, draw.int(1, 2), draw.int(2, n)])
        padding = draw.pick(None, draw.int(0, rows - 1))
        writer = Writer()
        bags = writer.op(
            aten.embedding_bag.padding_idx, table.write(writer), writer.plain(index), writer.plain(offsets), False,
            ["sum", "mean", "max"].index(mode), False, None, False, padding,
        )  # fmt: skip
        found = run_integer(writer, [writer.q(writer.pick(bags, 0), grid)], draw.mode)
        one_scale = len(np.unique(table.scale)) == 1
        common = float(table.scale.max()) / (1 if one_scale else 2**8)
        for bag, column in np.ndindex(3, width):
            inside = index[offsets[bag] : offsets[bag + 1] if bag < 2 else n].tolist()
            inside = [i for i in inside if i != padding]
            steps = [round(int(table.steps[i, column]) * float(table.scale[i, column]) / common) for i in inside]
            acc = max(steps, default=0) if mode == "max" else sum(steps)
            if mode == "mean":
                expected = reference.divided(acc, common, max(len(inside), 1), grid)
            else:
                expected = reference.requantize(acc, (common,), grid, draw.mode)
            assert found[0][bag, column] == expected, f"seed {seed}"
        if one_scale:
            tally.add(writer, found, "any" if mode == "mean" else draw.mode)
        else:  # rows are rounded to 1/256 of the largest step: an output can be a step away
            assert difference_from_qdq(writer, found)[2] <= 1
    tally.check()


IDS = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["float32", "fixed_point"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("bits", [4, 8])
def test_tables_of_a_quantizer_and_their_vectors(bits, symmetric, mode, tmp_path):
    torch.manual_seed(0)
    config = get_embedding_quantization_config(bits=bits, group_size=4 if bits == 4 else None, symmetric=symmetric)
    quantizer = ComposableQuantizer([EmbeddingQuantizer().set_global(config), x86()])
    quantized = quantize(Text().eval(), (IDS,), quantizer, [IDS])
    gm = to_integer(quantized.module, requantization=mode, strict=True)
    assert integer_report(gm).of("embedding").reason == "lookup in an integer table on the output's scale"
    assert check(dump_vectors(gm, IDS, tmp_path)) == {"lookup": 1, "linear": 1, "thresholds": 1, "float_linear": 1}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_that_is_read_in_float_is_gathered_as_integers(bits, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    config = get_embedding_quantization_config(bits=bits, group_size=4 if bits == 4 else None, symmetric=False)
    quantizer = ComposableQuantizer([EmbeddingQuantizer().set_global(config), xnnpack(is_dynamic=True)])
    quantized = quantize(net, (IDS,), quantizer, dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},))
    gm = to_integer(quantized.module, strict=True)
    assert integer_report(gm).of("embedding").reason == "lookup of integers, read in float"
    assert not [t for t in gm.state_dict().values() if t.is_floating_point() and t.shape == (20, 8)]
    assert torch.equal(gm(IDS), gm(IDS.repeat(3, 1))[3:6])
    torch.testing.assert_close(gm(IDS), quantized(IDS), rtol=1e-5, atol=1e-5)
    assert check(dump_vectors(gm, IDS, tmp_path)) == {"float_lookup": 1, "dynamic_linear": 1}
    exported = torch.export.export(gm, (IDS,))
    assert torch.equal(exported.module()(IDS), gm(IDS))


class Bag(nn.Module):
    def __init__(self, bag: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.table, self.head, self.bag = nn.Parameter(torch.randn(20, 8)), nn.Linear(8, 4), bag

    def forward(self, ids):
        return self.head(self.bag(ids, self.table))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "sum"}, ""),
        ({"mode": "mean"}, ""),
        ({"mode": "max"}, ""),
        ({"mode": "sum", "padding_idx": 1}, ""),
        ({"mode": "mean", "padding_idx": 1}, ""),
        ({"mode": "max", "padding_idx": 1}, ""),
        ({"mode": "sum", "per_sample_weights": True}, "it weighs its rows with floats"),
    ],
)
def test_bags_of_a_quantizer(options, reason, bits, tmp_path):
    """Those without an integer form are listed with their reason, refused by strict, and computed as before."""
    torch.manual_seed(0)

    def bag(ids, table):
        more = options | {"per_sample_weights": ids * 0.1} if "per_sample_weights" in options else options
        return F.embedding_bag(ids, table, **more)

    config = get_embedding_quantization_config(bits=bits, group_size=4 if bits == 4 else None)
    quantizer = ComposableQuantizer([EmbeddingQuantizer().set_global(config), x86()])
    quantized = quantize(Bag(bag).eval(), (IDS,), quantizer, [IDS])
    gm = to_integer(quantized.module, strict=not reason)
    verdict = integer_report(gm).of("embedding_bag")
    torch.testing.assert_close(gm(IDS), quantized(IDS), rtol=1e-5, atol=1e-5 if reason else 0.05)
    if not reason:
        assert verdict.integer
        kind = {"sum": "bag", "mean": "quotient", "max": "bag_maximum"}[options["mode"]]
        assert check(dump_vectors(gm, IDS, tmp_path)) == {kind: 1, "float_linear": 1}
        return
    assert (verdict.integer, verdict.annotated, verdict.reason) == (False, True, reason)
    with pytest.raises(Quant2eError, match=rf"'embedding_bag' \(aten\.embedding_bag\.\w+\): {reason}"):
        to_integer(quantized.module, strict=True)
