"""A CNN for a phone: float model in, a .pte for XNNPACK out, with a page to look at."""

from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import nn

import lowering
import quant2e
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config


class Block(nn.Module):
    """A residual block with a depthwise convolution, as mobile networks have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[batch, width, height, width of the image]`` in, the same out."""
        return x + self.layers(x)


def main(folder: Path) -> lowering.ExecuTorchProgram:
    """Write ``cnn_int8.pte`` and ``cnn_int8.html`` to ``folder``."""
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU6(), Block(16), Block(16), *head).eval()
    example_inputs = (torch.randn(1, 3, 32, 32),)
    calibration_data = [torch.randn(8, 3, 32, 32) for _ in range(13)]  # yours: about 100 images

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    result = quant2e.quantize(model, example_inputs, quantizer, calibration_data, dynamic_batch=8)
    print(repr(result.report))

    program = lowering.to_executorch(result)  # compared with the Q/DQ graph, within one step of it or refused
    program.save(folder / "cnn_int8.pte")
    result.report.to_html(folder / "cnn_int8.html", program)
    return program


if __name__ == "__main__":
    main(Path(mkdtemp()))
