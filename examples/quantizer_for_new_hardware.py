"""A quantizer for new hardware: a table of rules, checked on generated graphs before anything is built on it."""

from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import nn

import quant2e
from quant2e import Arg, HistogramObserver, PerChannelMinMaxObserver, QuantizationSpec, constant, op
from quantizers import Derived, Follow, Rule, RuleQuantizer, Same

aten = torch.ops.aten

# The chip requantizes by shifting, so every scale is a power of two.
ACT = QuantizationSpec(
    torch.int8, HistogramObserver.with_args(power_of_two=True), -128, 127, torch.per_tensor_symmetric
)
WEIGHTS = PerChannelMinMaxObserver.with_args(power_of_two=True)
WEIGHT = QuantizationSpec(torch.int8, WEIGHTS, -127, 127, torch.per_channel_symmetric, ch_axis=0)

x, w, b = Arg("x"), constant("w"), constant("b", optional=True)
product = op(aten.conv2d.default, aten.linear.default)(x, w, b)
clamp = op(aten.relu.default, aten.relu6.default)
moves = op(aten.max_pool2d.default, aten.flatten.using_ints)(x)


class ShiftQuantizer(RuleQuantizer):
    """What the chip computes in integers: products with a clamp behind them, and moves of what is quantized."""

    rules = (
        Rule(clamp(product) | product, {"x": ACT, "w": WEIGHT, "b": Derived.bias("x", "w")}, ACT, name="product"),
        Rule(moves, {"x": Follow(ACT)}, Same("x"), name="moves"),
    )


def main(folder: Path) -> quant2e.QuantizedModel:
    """Write ``encodings.json``, the numbers for a compiler of that chip, to ``folder``."""
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(392, 4), nn.GELU()
    model, inputs = nn.Sequential(*body).eval(), (torch.randn(4, 3, 16, 16),)
    result = quant2e.quantize(model, inputs, ShiftQuantizer(), [torch.randn(4, 3, 16, 16) for _ in range(4)])
    print(result.report)  # gelu is float, and says why
    result.encodings.to_file(folder / "encodings.json")
    return result


if __name__ == "__main__":
    main(Path(mkdtemp()))
