"""Embedding tables: what is annotated, how exact the result is, and how it composes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant2e import AnnotationError, capture, convert_pt2e, prepare_pt2e
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    QuantizationConfig,
    XNNPACKQuantizer,
    get_embedding_operators_config,
    get_embedding_quantization_config,
    get_symmetric_quantization_config,
)
from tests.quantizers.models import Of, annotations

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
        (Of(lambda m, i: m.e(torch.arange(3)) + i[..., None], e=nn.Embedding(10, 4)), f"embedding: e_weight {ROW}  [embedding]"),
        (nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)), f"embedding: _0_weight {ROW}  [embedding]"),
    ],
)  # fmt: skip
def test_annotations(model, expected):
    assert annotations(model, IDS, EmbeddingQuantizer()) == expected


def test_the_error_is_at_most_half_a_step_of_the_row():
    torch.manual_seed(0)
    model = nn.Embedding(10, 64)
    with torch.no_grad():
        model.weight.mul_(torch.logspace(-4, 3, 10)[:, None])
    converted = convert_pt2e(prepare_pt2e(capture(model.eval(), IDS), EmbeddingQuantizer()))
    rows = model.weight[IDS[0]]
    step = rows.abs().amax(-1, keepdim=True) / 127
    assert ((converted(*IDS) - rows).abs() <= step * 0.5001).all()
    assert [p.dtype for p in converted.state_dict().values() if p.dim() == 2] == [torch.int8]


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
        f"linear: embedding s8[-128,127] dynamic, head_weight {ROW}  [dynamic linear]",
    ]
    converted = convert_pt2e(prepare_pt2e(capture(Tied().eval(), IDS), quantizer))
    assert [tuple(p.shape) for p in converted.state_dict().values() if p.dtype == torch.int8] == [(10, 8)]


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
