"""A walk through the whole flow, with everything it makes on the way printed. ``python docs/tour.py`` runs it.

The model is small and does a little of everything: a convolution with batch norm (which prepare folds), a residual
add (whose operands need scales of their own), a pooling (which keeps its input's scale) and a linear layer.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import lowering
import quant2e
from quant2e import graph_text, plan_of
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config


class Residual(nn.Module):
    """Images (N, 3, 16, 16) in, class scores (N, 10) out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of each class."""
        features = self.stem(images)
        features = torch.relu(self.body(features) + features)
        return self.head(self.pool(features).flatten(1))


def show(title: str, text: object) -> None:
    """Print one stop of the walk."""
    print(f"\n--- {title} ---\n{text}")


def main(folder: Path) -> quant2e.QuantizedModel:
    """Walk from a module to programs that run; files go to ``folder``."""
    torch.manual_seed(0)
    model = Residual().eval()
    example_inputs = (torch.randn(2, 3, 16, 16),)
    batches = [torch.randn(2, 3, 16, 16) for _ in range(16)]

    # 1. Capture. torch.export turns the module into a flat graph of ATen ops. Train and eval still work on it.
    graph = quant2e.capture(model, example_inputs)
    show("1. captured: ATen ops, in the order they run", graph_text(graph))

    # 2. A quantizer says what the backend computes in integers, and with which numbers. It does not touch the graph;
    # it annotates it, when prepare asks.
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    quantizer.set_module_name("head", None)  # a config of None: leave this module float

    # 3. Prepare. Batch norms are folded, annotations are read into a plan (one line per set of quantization
    # parameters, then the points that share it), and one observer per line goes into a copy of the graph.
    prepared = quant2e.prepare_pt2e(graph, quantizer)
    show("3. the plan: numbers, and the points that share them", plan_of(prepared))

    # 4. Calibrate. Observers keep ranges and counts, never data. Weights were already observed.
    quant2e.calibrate(prepared, batches)

    # 5. Convert. Weights become integers; around every annotated op stand quantize and dequantize.
    converted = quant2e.convert_pt2e(prepared)
    show("5. converted: the Q/DQ graph", graph_text(converted))

    # 6. The same in one call, which also holds batches out to measure the error, and returns the report: a verdict
    # for every float op, sizes, and what did not happen.
    result = quant2e.quantize(model, example_inputs, quantizer, batches)
    show("6. the report", result.report)

    # 7. Save and load. Bit-identical, and torch.export.load reads the same file.
    result.save(folder / "tour_int8.pt2")
    again = quant2e.load(folder / "tour_int8.pt2")
    show("7. loaded again, equal bit for bit", torch.equal(again(*example_inputs), result(*example_inputs)))

    # 8. Lower. The program is run and compared with the Q/DQ graph before you get it.
    program = lowering.to_executorch(result, example_inputs)
    program.save(folder / "tour_int8.pte")
    show("8. lowered to ExecuTorch", program.report)

    # 9. A mistake, and what it says. No module is called 'haed'.
    typo = XNNPACKQuantizer().set_module_name("haed", get_symmetric_quantization_config())
    try:
        quant2e.prepare_pt2e(graph, typo)
    except quant2e.Quant2eError as error:
        show(f"9. a mistake: {type(error).__name__}", error)
    return result


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
