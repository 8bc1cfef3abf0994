"""Weight reads: bytes of weights that a call reads, by hand, and what reports say of models that are weight-only."""

import pytest
import torch
from torch import nn

from quant2e.graph.captured.capture import capture
from quant2e.pipeline import quantize
from quant2e.report.weight_reads import weight_reads
from quantizers import ComposableQuantizer, EmbeddingQuantizer, X86InductorQuantizer


class Words(nn.Module):
    """A table, of which a call reads three rows, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.table, self.mixed, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50)

    def forward(self, ids):
        return self.head(self.mixed(self.mixed(self.table(ids))).relu())


IDS = torch.tensor([[1, 2, 3]])
IN_FLOAT = 4 * (2 * (64 * 64 + 64) + 64 * 50 + 50)


def quantized(recipe):
    torch.manual_seed(0)
    quantizer = ComposableQuantizer([EmbeddingQuantizer(), X86InductorQuantizer().set_global(recipe)])
    return quantize(Words().eval(), (IDS,), quantizer, min_sqnr_db=None)


def test_of_float_weights():
    assert weight_reads(capture(Words(), (IDS,))) == IN_FLOAT


@pytest.mark.parametrize(
    ("recipe", "bits", "bits_of_a_group"),
    [("w8", 8, None), ("w4-g32-sym", 4, 16), ("w4-g32", 4, 16 + 4)],
)
def test_of_integers_and_scales(recipe, bits, bits_of_a_group):
    weights, biases, rows = 2 * 64 * 64 + 64 * 50, 2 * 64 + 50, 2 * 64 + 50
    of_scales = 32 * rows if bits_of_a_group is None else bits_of_a_group * weights // 32
    report = quantized(recipe).report
    assert report.float_weight_reads == IN_FLOAT
    assert report.weight_reads == (bits * weights + of_scales) // 8 + 4 * biases


def test_reports_of_weight_only_models_do_not_read_like_failures():
    report = quantized("w8").report
    text = str(report)
    assert "multiply-accumulates on int8" not in text
    assert (
        "weight-only: products compute in float, on fewer bytes; weights read by a call: "
        f"{IN_FLOAT:,} -> {report.weight_reads:,} bytes"
    ) in text
    assert type(report).from_dict(report.as_dict()) == report
