"""Attention masks that come in as floats, under the shipped quantizers: exact, whatever their sentinel."""

import math

import pytest
import torch
from torch import nn

import quant2e
from quant2e.report.report import FLOAT, STATIC
from quantizers import X86InductorQuantizer, XNNPACKQuantizer


class Encoder(nn.Module):
    """Like the encoders of model hubs: a mask of 0 and 1 comes in, or a finished one; two layers read it."""

    def __init__(self, never):
        super().__init__()
        self.never = never
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(16, 16) for n in "qkvo"}) for _ in range(2))
        self.norm = nn.LayerNorm(16)

    def forward(self, x, mask):
        if self.never is not None:
            mask = (1.0 - mask) * self.never
        mask = mask[:, None, None, :]
        for layer in self.layers:
            q, k, v = (layer[n](x).view(*x.shape[:2], 2, 8).transpose(1, 2) for n in "qkv")
            scores = q @ k.transpose(-1, -2) / math.sqrt(8) + mask
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = self.norm(x + layer["o"](mixed))
        return x


def batches(hidden, shown=0.0):
    made = []
    for i in range(8):
        keep = torch.rand(4, 6) > (0.3 if i else -1.0)
        keep[:, 0] = True
        made.append((torch.randn(4, 6, 16), torch.where(keep, shown, hidden)))
    return made


@pytest.mark.parametrize("quantizer", [XNNPACKQuantizer, X86InductorQuantizer])
@pytest.mark.parametrize(
    ("never", "hidden"),
    [(None, -1e4), (None, -1e9), (None, -math.inf), (None, torch.finfo(torch.float32).min), (-1e4, 0.0)],
)
def test_an_encoder(quantizer, never, hidden):
    shown = 0.0 if never is None else 1.0
    model, data = Encoder(never).eval(), batches(hidden, shown)
    result = quant2e.quantize(model, data[0], quantizer().set_global("w8a8"), data)
    assert result.report.sqnr_db > 25
    assert result.report.of("add").kind == FLOAT
    assert result.report.of("linear").kind == STATIC
    prepared = quant2e.prepare_pt2e(quant2e.capture(model, data[0]), quantizer().set_global("w8a8"))
    stepped = quant2e.convert_pt2e(quant2e.calibrate(prepared, data))
    assert quant2e.report_of(stepped).of("add").kind == FLOAT
