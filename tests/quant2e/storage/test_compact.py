"""Compact constants: the same values from fewer bytes, in files that torch reads, and nothing else in their place."""

from pathlib import Path

import pytest
import torch
from torch import nn

from quant2e.graph.captured.capture import as_graph_module, capture
from quant2e.graph.edit import emit
from quant2e.graph.printer import graph_text
from quant2e.graph.qdq_ops import qd
from quant2e.pipeline import quantize
from quant2e.quantized_model import load
from quant2e.storage.compact import restore_constants, with_compact_constants
from quant2e.storage.pt2 import read_pt2
from quant2e.weights.short_form import Shortening, shortened
from quantizers import ComposableQuantizer, EmbeddingQuantizer, X86InductorQuantizer

aten = torch.ops.aten


class Reader(nn.Module):
    """Dequantizes a matrix, per row."""

    def __init__(self, integers, scales, zero_points):
        super().__init__()
        self.register_buffer("w", integers)
        self.register_buffer("s", scales)
        self.register_buffer("z", zero_points)

    def forward(self, x):
        bounds = torch.iinfo(self.w.dtype)
        return x + qd.dequantize_per_channel(self.w, self.s, self.z, 0, bounds.min, bounds.max, self.w.dtype)


def reader(integers, scales=None, zero_points=None):
    rows = len(integers)
    scales = torch.full((rows,), 0.5) if scales is None else scales
    zero_points = torch.zeros(rows, dtype=torch.int32) if zero_points is None else zero_points
    module = Reader(integers, scales, zero_points)
    return capture(module, (torch.zeros(integers.shape),)), module


def targets(gm):
    return [str(node.target).removeprefix("aten.") for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("low", "high", "dtype", "behind", "stored"), [
    (-8, 7, torch.int8, ["to.dtype", "add.Tensor"], 0.5),
    (0, 15, torch.int8, ["to.dtype"], 0.5),
    (0, 15, torch.uint8, [], 0.5),
    (100, 115, torch.uint8, ["add.Tensor"], 0.5),
    (-2, 1, torch.int8, ["to.dtype", "add.Tensor"], 0.25),
    (-8, 8, torch.int8, None, 1),
    (-128, 127, torch.int8, None, 1),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(80, 96), (81, 96), (81, 97)])
def test_integers_share_bytes(low, high, dtype, behind, stored, shape):
    torch.manual_seed(0)
    integers = torch.randint(low, high + 1, shape, dtype=torch.int64).to(dtype)
    integers[0, :2] = torch.tensor([low, high], dtype=dtype)
    gm, module = reader(integers)
    short = with_compact_constants(gm)
    before, after = graph_text(gm.graph), targets(short)
    held = short.get_buffer("w")
    assert torch.equal(module.w, integers)
    assert gm.get_buffer("w") is module.w
    if behind is None:
        assert held is module.w
    else:
        assert held.dtype is torch.uint8
        assert stored <= held.numel() / integers.numel() < stored * 1.05
        assert len(held.unique()) > 240
        cut = ["slice.Tensor"] if shape == (81, 97) else []
        place = after.index("cat.default") + 1
        assert after[place : place + len(cut) + len(behind)] == [*cut, *behind]
    x = torch.randn(shape)
    assert torch.equal(short(x), module(x))
    assert restore_constants(short) == (behind is not None)
    assert graph_text(short.graph) == before
    restored = short.get_buffer("w")
    assert torch.equal(restored, integers)
    assert (restored.dtype, restored.stride()) == (integers.dtype, integers.stride())
    assert torch.equal(short(x), module(x))


@pytest.mark.parametrize(("scales", "zero_points", "kept"), [
    (torch.full((1000,), 0.5), torch.zeros(1000, dtype=torch.int64), (torch.bfloat16, 1)),
    (torch.full((1000,), 0.5), torch.full((1000,), 7, dtype=torch.int32), (torch.bfloat16, 1)),
    (torch.full((1000,), 0.1), torch.arange(1000) % 200, (torch.float32, 1000)),
    (torch.full((1000,), 0.1).bfloat16().float(), torch.arange(1000) % 256 - 128, (torch.bfloat16, 1000)),
    (torch.full((1000,), 0.1).bfloat16().float(), torch.arange(1000) % 16 - 8, (torch.bfloat16, 500)),
    (torch.rand(1000).double() + 0.1, torch.arange(1000), (torch.float64, 1000)),
])  # fmt: skip
def test_parameters_are_stored_once_or_in_fewer_bits(scales, zero_points, kept):
    gm, module = reader(torch.randint(-128, 128, (1000, 2)).to(torch.int8), scales, zero_points)
    short = with_compact_constants(gm)
    assert (short.get_buffer("s").dtype, short.get_buffer("z").numel()) == kept
    x = torch.randn(1000, 2)
    assert torch.equal(short(x), module(x))
    restore_constants(short)
    assert torch.equal(short.get_buffer("s"), scales)
    assert torch.equal(short.get_buffer("z"), zero_points)
    assert short.get_buffer("z").dtype is zero_points.dtype
    assert graph_text(short.graph) == graph_text(gm.graph)


def test_small_constants_stay():
    gm, _ = reader(torch.ones(20, 20, dtype=torch.int8))
    assert with_compact_constants(gm) is gm


class State(nn.Module):
    """Integers that are written, read by something else, or share memory with others."""

    def __init__(self, kind):
        super().__init__()
        whole = torch.zeros(160, 96, dtype=torch.int8)
        self.kind = kind
        self.register_buffer("w", whole[:80] if kind == "part" else torch.zeros(80, 96, dtype=torch.int8))
        self.register_buffer("v", self.w if kind == "tied" else whole[80:])
        self.register_buffer("s", torch.rand(80) + 0.1)
        self.register_buffer("z", torch.arange(80))

    def forward(self, x):
        if self.kind == "written":
            self.w.add_(1)
        y = qd.dequantize_per_channel(self.w, self.s, self.z, 0, -128, 127, torch.int8)
        if self.kind == "tied":
            y = y + qd.dequantize_per_channel(self.v, self.s, self.z, 0, -128, 127, torch.int8)
        return x + y + (self.w if self.kind == "read" else 0)


@pytest.mark.parametrize("kind", ["written", "read", "part", "tied"])
def test_other_tensors_stay(kind):
    gm = capture(State(kind), (torch.zeros(80, 96),))
    short = with_compact_constants(gm)
    x = torch.randn(80, 96)
    assert short.get_buffer("w").dtype is torch.int8
    assert short.get_buffer("w").numel() == 80 * 96
    assert torch.equal(short(x), gm(x)) or kind == "written"


# -------------------------------------------------------------------------------------------------------- hostile forms


def by_hand(make):
    """A graph that dequantizes what ``make`` puts in place of the zero points of 40 scales."""
    gm, _ = reader(torch.zeros(40, 3, dtype=torch.int8), torch.rand(40) + 0.1, torch.zeros(1, dtype=torch.int64))
    dequantize = next(node for node in gm.graph.nodes if node.target is qd.dequantize_per_channel.default)
    zero = dequantize.args[2]
    dequantize.replace_input_with(zero, make(dequantize, zero))
    gm.recompile()
    return gm


@pytest.mark.parametrize(("make", "restored"), [
    (lambda place, zero: emit(place, aten.repeat.default, zero, [40]), True),
    (lambda place, zero: emit(place, aten.repeat.default, zero, [1 << 40]), False),
    (lambda place, zero: emit(place, aten.repeat.default, zero, [8, 5]), False),
    (lambda place, zero: emit(place, aten.cat.default, [zero] * 40), False),
    (lambda place, zero: emit(place, aten.expand.default, zero, [40]), False),
])  # fmt: skip
def test_only_the_forms_that_are_written_are_restored(make, restored):
    gm = by_hand(make)
    assert restore_constants(gm) == restored
    assert gm.get_buffer("z").numel() == (40 if restored else 1)


class Sum(nn.Module):
    """A buffer that the model itself computes with, in front of a quantized layer."""

    def __init__(self, of):
        super().__init__()
        self.of, self.layer = of, nn.Linear(64, 64)
        self.register_buffer("position", torch.randn(1, 40, 64))

    def forward(self, x):
        return self.layer(self.of(self.position, x))


@pytest.mark.parametrize("of", [
    lambda position, x: position + x,
    lambda position, x: aten.slice.Tensor(position + x, 1, 0, 20),
])  # fmt: skip
def test_what_a_model_computes_of_its_buffers_stays(of, tmp_path):
    x = torch.randn(1, 40, 64)
    model = quantize(Sum(of).eval(), (x,), X86InductorQuantizer().set_global("w8a8"), [(x,)], min_sqnr_db=None)
    model.save(tmp_path / "model.pt2")
    again = load(tmp_path / "model.pt2")
    assert targets(again.module) == targets(model.module)
    assert torch.equal(again.module.get_buffer("position"), model.module.get_buffer("position"))
    assert torch.equal(again(x), model(x))


def packed(place, leaf, low=-8, dtype=torch.int8, mask=15, shift=4):
    parts = [
        emit(place, aten.bitwise_and.Scalar, leaf, mask),
        emit(place, aten.bitwise_right_shift.Tensor_Scalar, leaf, shift),
    ]
    wide = emit(place, aten.to.dtype, emit(place, aten.cat.default, parts, 0), dtype)
    return emit(place, aten.add.Tensor, wide, low)


@pytest.mark.parametrize(("make", "restored"), [
    (packed, True),
    (lambda place, leaf: packed(place, leaf, low=1 << 40), False),
    (lambda place, leaf: packed(place, leaf, low=emit(place, aten.full.default, [3], 1)), False),
    (lambda place, leaf: packed(place, leaf, dtype=torch.complex128), False),
    (lambda place, leaf: packed(place, leaf, mask=7), False),
    (lambda place, leaf: packed(place, leaf, shift=3), False),
    (lambda place, leaf: emit(place, aten.add.Tensor, leaf, 1), False),
    (lambda place, leaf: emit(place, aten.slice.Tensor, leaf, 0, 0, 3), False),
    (lambda place, leaf: emit(place, aten.to.dtype, leaf, torch.float64), False),
])  # fmt: skip
def test_only_packed_bytes_are_unpacked(make, restored):
    gm, _ = reader(torch.zeros(80, 3, dtype=torch.uint8))
    dequantize = next(node for node in gm.graph.nodes if node.target is qd.dequantize_per_channel.default)
    dequantize.replace_input_with(dequantize.args[0], make(dequantize, dequantize.args[0]))
    assert restore_constants(gm) == restored
    assert gm.get_buffer("w").shape == (160 if restored else 80, 3)


@pytest.mark.parametrize("kind", ["read", "tied"])
def test_bytes_that_something_else_reads_stay(kind):
    gm, _ = reader(torch.zeros(80, 3, dtype=torch.uint8))
    dequantize = next(node for node in gm.graph.nodes if node.target is qd.dequantize_per_channel.default)
    dequantize.replace_input_with(dequantize.args[0], packed(dequantize, dequantize.args[0]))
    if kind == "tied":
        gm.register_buffer("v", gm.get_buffer("w"))
    else:
        emit(dequantize, aten.add.Tensor, gm.graph.create_node("get_attr", "w"), 1)
    assert restore_constants(gm) == 0
    assert gm.get_buffer("w").shape == (80, 3)


def test_zero_points_are_repeated_once_for_a_tensor_of_scales():
    """Else a small file gives as many tensors of that size as it has ops."""
    gm = by_hand(lambda place, zero: emit(place, aten.repeat.default, zero, [40]))
    dequantize = next(node for node in gm.graph.nodes if node.target is qd.dequantize_per_channel.default)
    gm.register_buffer("z2", torch.ones(1, dtype=torch.int64))
    with gm.graph.inserting_before(dequantize):
        other = emit(dequantize, aten.repeat.default, gm.graph.get_attr("z2"), [40])
    emit(dequantize, dequantize.target, *dequantize.args[:2], other, *dequantize.args[3:])
    assert restore_constants(gm) == 1
    assert gm.get_buffer("z").numel() + gm.get_buffer("z2").numel() == 41


# ---------------------------------------------------------------------------------------------------------- whole files


class Decoder(nn.Module):
    """A table and linear layers."""

    def __init__(self, width=128, words=501):
        super().__init__()
        self.table, self.head = nn.Embedding(words, width), nn.Linear(width, words)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x)


def decoder(recipe, **sizes):
    torch.manual_seed(0)
    quantizer = ComposableQuantizer(
        [EmbeddingQuantizer().set_global(recipe), X86InductorQuantizer().set_global(recipe)]
    )
    return quantize(Decoder(**sizes).eval(), (torch.arange(7)[None],), quantizer, min_sqnr_db=None)


@pytest.mark.parametrize("recipe", ["w8", "w4-g32-sym", "w4-g32-asym", "w2-g32-sym"])
def test_files_give_back_what_was_saved(recipe, tmp_path):
    model, path, ids = decoder(recipe), tmp_path / "model.pt2", torch.arange(7)[None]
    model.save(path)
    again = load(path)
    ours, theirs = dict(model.module.named_buffers()), dict(again.module.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name])
        assert (tensor.dtype, tensor.stride()) == (theirs[name].dtype, theirs[name].stride())
    assert again.encodings == model.encodings
    assert torch.equal(again(ids), model(ids))
    program = torch.export.load(path)
    assert torch.equal(program.module()(ids), model(ids))
    restored = as_graph_module(program)
    restore_constants(restored)
    assert sorted(targets(restored)) == sorted(targets(model.module))
    again.save(tmp_path / "again.pt2")
    assert abs((tmp_path / "again.pt2").stat().st_size - path.stat().st_size) < 1000


def test_what_is_stored_is_made_when_it_is_read_and_checked_without_its_values(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128)).eval()
    result = quantize(model, torch.randn(2, 128), X86InductorQuantizer().set_global("w4-g32"), min_sqnr_db=None)
    place = with_compact_constants(result.module).get_buffer("0.weight_quantized").place
    assert isinstance(place, Shortening)
    assert place.value is result.module.get_buffer("0.weight_quantized")
    result.save(tmp_path / "m.pt2")
    read = read_pt2(tmp_path / "m.pt2", mapped=True).module
    assert torch.equal(shortened(read.get_buffer("0.weight_quantized")).stored, place.read())
    assert torch.equal(read(torch.ones(2, 128)), result(torch.ones(2, 128)))
    assert graph_text(read.graph) == graph_text(load(tmp_path / "m.pt2").module.graph)


def test_fewer_bits_make_smaller_files(tmp_path):
    sizes = {}
    for recipe in ("w8", "w4-g32-sym", "w2-g32-sym"):
        decoder(recipe).save(tmp_path / f"{recipe}.pt2")
        sizes[recipe] = (tmp_path / f"{recipe}.pt2").stat().st_size
    assert sizes["w2-g32-sym"] < sizes["w4-g32-sym"] < 0.75 * sizes["w8"]


def test_a_file_of_format_4_is_read_for_ever():
    """4 bits two to a byte, zero points once."""
    model = load(Path(__file__).parent / "golden" / "format_4.pt2")
    assert not any("bitwise" in target for target in targets(model.module))
    (head,) = (group for group in model.encodings.groups if "head_weight" in str(group.points))
    assert (len(head.scale), set(head.zero_point)) == (400, {0})
    assert model.module.get_buffer("head.weight_quantized").shape == (200, 64)
    assert model(torch.arange(7)[None]).double().sum().item() == pytest.approx(39.58565663732588, rel=1e-5)
