"""Encodings of a model that went through algorithms hold for one that went through the same, and say so."""

import pytest
import torch
from torch import nn

import quant2e
from quant2e.report.algorithm_step import kept_algorithms
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config


def spread_net():
    """Two linears whose channels in between span two decades, which relu does not see."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    spread = torch.logspace(-1, 1, 16)
    with torch.no_grad():
        model[0].weight.mul_(spread[:, None])
        model[0].bias.mul_(spread)
        model[2].weight.div_(spread)
    return model


def test_encodings_after_equalization(tmp_path):
    torch.manual_seed(1)
    model, data = spread_net(), [torch.randn(8, 8) for _ in range(6)]
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    first = quant2e.quantize(model, data[0], quantizer, data, algorithms=["equalize"])
    assert kept_algorithms(first.report.algorithms) == first.encodings.algorithms == ("equalize",)
    first.encodings.to_file(tmp_path / "encodings.json")
    read = quant2e.Encodings.from_file(tmp_path / "encodings.json")
    assert read == first.encodings
    with pytest.raises(quant2e.AnnotationError, match=r"found after equalize, .* went through no algorithm: give alg"):
        quant2e.quantize(model, data[0], quantizer, data, encodings=read)
    again = quant2e.quantize(model, data[0], quantizer, data, encodings=read, algorithms=["equalize"])
    assert torch.equal(again(data[1]), first(data[1]))
    assert again.encodings == first.encodings
    prepared = quant2e.prepare_pt2e(quant2e.capture(model, data[0]), quantizer)
    converted = quant2e.convert_pt2e(prepared, encodings=read)
    assert any("found after equalize: bit for bit" in note for note in quant2e.report_of(converted).notes)
    plain = quant2e.quantize(model, data[0], quantizer, data)
    assert plain.encodings.algorithms == ()
    assert "after no algorithm -> equalize" in plain.encodings.diff(first.encodings)
