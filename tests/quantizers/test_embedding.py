"""Embedding tables: what is annotated, how exact the result is, and how it composes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quant2e import AnnotationError, capture, convert_pt2e, prepare_pt2e, quantize
from quant2e.cpu import may_overflow
from quant2e.graph.qdq_ops import qd
from quant2e.observers.encodings import encode
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    QuantizationConfig,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_embedding_operators_config,
    get_embedding_quantization_config,
    get_symmetric_quantization_config,
)
from quantizers import get_embedding_quantization_config as table_config
from tests.quantizers.models import Of, annotated, annotations, reasons

IDS = (torch.tensor([[1, 2, 0], [3, 3, 9]]),)
ROW = "s8[-127,127] symmetric axis 0"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Embedding(10, 4), f"embedding: weight {ROW}  [embedding]"),
        (nn.Embedding(10, 4, padding_idx=0), f"embedding: weight {ROW}  [embedding]"),
        (nn.EmbeddingBag(10, 4, mode="sum"), f"embedding_bag: weight {ROW}  [embedding_bag]"),
        (Of(lambda m, i: F.embedding(i, m.e.weight * 2), e=nn.Embedding(10, 4)), f"embedding: mul {ROW}  [embedding]"),
        (Of(lambda m, i: F.embedding(i, i.float())), ""),
        (Of(lambda m, i: m.e(torch.arange(3)) + i[..., None], e=nn.Embedding(10, 4)),
            f"embedding: e_weight {ROW}  [embedding]"),
        (nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)), f"embedding: _0_weight {ROW}  [embedding]"),
    ],
)  # fmt: skip
def test_annotations(model, expected):
    assert annotations(model, IDS, EmbeddingQuantizer()) == expected


ROWS = st.lists(
    st.lists(st.floats(-1024, 1024, width=32) | st.floats(-(2**-10), 2**-10, width=32), min_size=8, max_size=8),
        min_size=1, max_size=4
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, bits=st.sampled_from([8, 4]), size=st.sampled_from([0, 2, 8]), symmetric=st.booleans())
def test_the_error_is_at_most_half_a_step_of_the_row_or_group(rows, bits, size, symmetric):
    weight = torch.tensor(rows)
    spec = table_config(bits=bits, group_size=size, symmetric=symmetric).weight
    arguments = {"quant_min": spec.quant_min, "quant_max": spec.quant_max, "qscheme": spec.qscheme, "ch_axis": 0}
    observer = spec.observer_or_fake_quant_ctr(dtype=spec.dtype, **arguments)
    observer(weight)
    found = encode(observer)
    tail = (found.quant_min, found.quant_max, found.dtype)
    if size:
        integers = qd.quantize_per_channel_group(weight, found.scale, found.zero_point, *tail, size)
        values = qd.dequantize_per_channel_group(
            integers, found.scale, found.zero_point, *tail, size, torch.float32
        ).reshape(-1, size)
    else:
        integers = qd.quantize_per_channel(weight, found.scale, found.zero_point, 0, *tail)
        values = qd.dequantize_per_channel(integers, found.scale, found.zero_point, 0, *tail)
    assert int(integers.min()) >= -(2 ** (bits - 1))
    assert int(integers.max()) <= 2 ** (bits - 1) - 1
    steps = found.scale.reshape(-1, 1)
    grouped = weight.reshape(len(steps), -1)
    # no step is coarser than the range of its values, zero included, asks for
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    assert bool((steps[:, 0] <= (span / (spec.quant_max - spec.quant_min)).clamp(min=2**-23) * 1.0001).all())
    assert bool(((values.reshape_as(grouped) - grouped).abs() <= steps * 0.5001).all())


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "s8[-127,127] symmetric axis 0"),
        ({"symmetric": False}, "s8[-128,127] axis 0"),
        ({"bits": 4}, "s8[-8,7] symmetric axis 0 groups of 32"),
        ({"bits": 4, "symmetric": False, "group_size": 16}, "s8[-8,7] axis 0 groups of 16"),
        ({"bits": 4, "group_size": 0}, "s8[-8,7] symmetric axis 0"),
        ({"group_size": 64}, "s8[-127,127] symmetric axis 0 groups of 64"),
    ],
)
def test_tables_of_fewer_bits(asked, expected):
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 2))
    quantizer = EmbeddingQuantizer().set_global(table_config(**asked))
    assert annotations(model, IDS, quantizer) == f"embedding: _0_weight {expected}  [embedding]"


@pytest.mark.parametrize(
    ("name", "asked"), [("w8", {}), ("w4-g32", {"bits": 4}), ("w4-g32-asym", {"bits": 4, "symmetric": False})]
)
def test_recipes(name, asked):
    assert EmbeddingQuantizer().set_global(name).get_global_quantization_config() == table_config(**asked)


def test_groups_that_do_not_divide_the_rows():
    quantizer = EmbeddingQuantizer().set_global(table_config(bits=4))
    gm = annotated(nn.Embedding(10, 40), IDS, quantizer)
    assert reasons(gm, quantizer) == {
        "embedding": "rule 'embedding': groups of 32 do not divide the rows of its table, which is [10, 40]"
    }


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


def test_a_tied_head_and_table_share_one_int8_weight():
    backend = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    quantizer = ComposableQuantizer([EmbeddingQuantizer(), backend])
    assert annotations(Tied(), IDS, quantizer).splitlines() == [
        f"embedding: head_weight {ROW}  [embedding]",
        f"linear: embedding s8[-128,127] dynamic per token, head_weight {ROW}  [dynamic linear]",
    ]
    converted = convert_pt2e(prepare_pt2e(capture(Tied().eval(), IDS), quantizer))
    assert [tuple(p.shape) for p in converted.state_dict().values() if p.dtype == torch.int8] == [(10, 8)]


def test_a_tied_head_and_table_have_each_their_own_scheme():
    backend = X86InductorQuantizer(isa="avx2").set_global(get_default_x86_inductor_quantization_config(is_dynamic=True))
    table = EmbeddingQuantizer().set_global(table_config(bits=4, group_size=4))
    result = quantize(Tied().eval(), IDS, ComposableQuantizer([table, backend]))
    kept = {name: tensor for name, tensor in result.module.state_dict().items() if tensor.dim() == 2}
    ranges = sorted((t.dtype, int(t.abs().max())) for t in kept.values() if t.dtype is torch.int8)
    assert [dtype for dtype, _ in ranges] == [torch.int8, torch.int8]
    assert ranges[0][1] <= 8 < ranges[1][1]
    assert not any(t.is_floating_point() and t.shape == (10, 8) for t in kept.values())


def test_a_tied_head_that_shares_its_table_keeps_kernels_exact():
    """One set of integers for both, as configured, with the room that the head's kernel needs."""
    head = get_default_x86_inductor_quantization_config(is_dynamic=True)
    table = EmbeddingQuantizer().set_global(QuantizationConfig(None, None, head.weight, None))
    backend = X86InductorQuantizer(isa="avx2").set_global(head)
    result = quantize(Tied().eval(), IDS, ComposableQuantizer([table, backend]))
    (integers,) = (t for t in result.module.state_dict().values() if t.dtype is torch.int8)
    (choose,) = (n for n in result.module.graph.nodes if "choose_qparams" in str(n.target))
    assert not may_overflow(integers, choose.args[2])


def test_a_table_can_be_left_float():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    assert annotations(model, IDS, EmbeddingQuantizer().set_module_name("0", None)) == ""


def test_configs():
    assert get_embedding_quantization_config() is get_embedding_quantization_config()
    assert get_embedding_operators_config().config.weight.ch_axis == 0
    act = get_symmetric_quantization_config()
    with pytest.raises(AnnotationError, match="an embedding has a weight and no other float operand"):
        EmbeddingQuantizer().set_global(act)
    with pytest.raises(AnnotationError, match="weight"):
        EmbeddingQuantizer().set_global(QuantizationConfig(None, None, None, None))
    assert EmbeddingQuantizer.quantization_capabilities() == {
        "embedding": ("embedding(w)",),
        "embedding_bag": ("embedding_bag(w)",),
    }
