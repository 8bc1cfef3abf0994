"""Accuracy that is bad, and mended: which layer makes the error, why, and what helps."""

from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import nn

import quant2e
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config


def uneven() -> nn.Module:
    """A model whose third linear has rows that differ by two decades, which the fourth undoes."""
    widths = (16, 32, 32, 32, 4)
    first, second, third, fourth = (nn.Linear(before, after) for before, after in pairwise(widths))
    spread = torch.logspace(-1.0, 1.0, 32)
    with torch.no_grad():
        third.weight.mul_(spread[:, None])
        third.bias.mul_(spread)
        fourth.weight.div_(spread)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), fourth).eval()


def main(folder: Path) -> tuple[float, float, str]:
    """Write ``bad.html`` and ``mended.html``; return the SQNR in dB before and after, and the worst op before."""
    torch.manual_seed(0)
    model = uneven()
    data = [torch.randn(16, 16) for _ in range(9)]
    inputs = (data[0],)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=False))

    bad = quant2e.quantize(model, inputs, quantizer, data)
    compared = quant2e.compare(quant2e.capture(model, inputs), bad, data[:2])  # the error that each op makes itself
    worst = compared.rows[0]
    print(worst)
    print(worst.advice)
    bad.report.to_html(folder / "bad.html", compared, title="Before")

    mended = quant2e.quantize(model, inputs, quantizer, data, algorithms=["equalize"])  # or "auto", which tries more
    mended.report.to_html(folder / "mended.html", title="After")
    before, after = bad.report.sqnr_db, mended.report.sqnr_db
    assert before is not None
    assert after is not None
    print(f"SQNR of the output: {before:.1f} dB, after equalize {after:.1f} dB")
    return before, after, worst.op


if __name__ == "__main__":
    main(Path(mkdtemp()))
