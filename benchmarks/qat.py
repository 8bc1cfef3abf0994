"""Few-bit weights on handwritten digits: calibrated, and trained with fake quantization.

    python -m benchmarks.qat --output benchmarks/results

A small network with batch norm is trained in float; then its weights get 8 to 2 bits (activations 8), once by
calibration and once by quantization-aware training: 10 % of the float schedule, learning rate from 1 % of the initial
one, on a cosine down to 1 % of that (and, for few bits, from 10 %). Three seeds; accuracy on images that no step has
seen.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import quant2e
from benchmarks.demo.digits import Digits, load
from quant2e.files import write_text
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

EPOCHS, BATCH, RATE = 30, 64, 0.1
TRAINED = 0.1
"""Share of the float schedule that quantization-aware training takes."""


def network() -> nn.Module:
    """A dense, a strided and a depthwise-separable convolution, each with batch norm, and a head;
    images [n, 1, 8, 8].
    """
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def batches(data: Digits, epochs: int, seed: int) -> list[Tensor]:
    """Indices of the training images, batch by batch; the last, smaller one of each epoch is left out."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(data.train_labels), generator=generator) for _ in range(epochs)]
    return [batch for order in orders for batch in order.split(BATCH) if len(batch) == BATCH]


def train(model: nn.Module, data: Digits, steps: list[Tensor], rate: float, last: float) -> None:
    """Stochastic gradient descent with a learning rate on a cosine from ``rate`` to ``last``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    for step, chosen in enumerate(steps):
        share = (1 + math.cos(math.pi * step / len(steps))) / 2
        optimizer.param_groups[0]["lr"] = last + (rate - last) * share
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen]).backward()
        optimizer.step()


def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the held-out images that are recognised."""
    with torch.no_grad():
        return float((model(data.test_images).argmax(1) == data.test_labels).float().mean())


def quantizer(bits: int, *, is_qat: bool) -> XNNPACKQuantizer:
    """Weights of so many bits per channel, activations of 8."""
    top = 2 ** (bits - 1) - 1
    return XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True, is_qat=is_qat, weight_qmin=-top, weight_qmax=top)
    )


def calibrated(captured: GraphModule, data: Digits, bits: int) -> float:
    """Accuracy after calibration on 256 training images."""
    prepared = quant2e.prepare_pt2e(captured, quantizer(bits, is_qat=False))
    quant2e.calibrate(prepared, data.train_images[:256].split(BATCH))
    return accuracy(quant2e.convert_pt2e(prepared), data)


def trained(captured: GraphModule, data: Digits, bits: int, rate: float, seed: int) -> float:
    """Accuracy after quantization-aware training from ``rate``, with observers and norms fixed for its last third."""
    prepared = quant2e.prepare_qat_pt2e(captured, quantizer(bits, is_qat=True))
    prepared.train()
    steps = batches(data, max(1, round(EPOCHS * TRAINED)), seed + 100)
    cut = 2 * len(steps) // 3
    train(prepared, data, steps[:cut], rate, 0.25 * rate)
    prepared.apply(quant2e.disable_observer)
    quant2e.freeze_batch_norm(prepared)
    train(prepared, data, steps[cut:], 0.25 * rate, 0.01 * rate)
    prepared.eval()
    return accuracy(quant2e.convert_pt2e(prepared), data)


def measure(seeds: int = 3) -> dict[str, object]:
    """Accuracies per number of bits, each a mean over ``seeds``; the lowest and highest beside it."""
    data = load()
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = network().train()
        train(model, data, batches(data, EPOCHS, seed), RATE, 0.01 * RATE)
        model.eval()
        found.setdefault("float", []).append(accuracy(model, data))
        batch = torch.export.Dim("batch", min=2, max=1024)
        captured = quant2e.capture(model, (data.train_images[:BATCH],), dynamic_shapes=({0: batch},))
        for bits in (8, 4, 3, 2):
            found.setdefault(f"w{bits} calibrated", []).append(calibrated(captured, data, bits))
            for share in (0.01, 0.1):
                name = f"w{bits} trained, rate {share:.0%}"
                found.setdefault(name, []).append(trained(captured, data, bits, RATE * share, seed))
    rows = {name: [statistics.mean(values), min(values), max(values)] for name, values in found.items()}
    return {"seeds": seeds, "float_epochs": EPOCHS, "accuracy": rows}


def table(result: dict[str, object]) -> str:
    """The result as a Markdown table."""
    rows = result["accuracy"]
    assert isinstance(rows, dict)
    lines = ["| weights | accuracy | lowest | highest |", "|---|---|---|---|"]
    lines += [f"| {name} | {mean:.2%} | {low:.2%} | {high:.2%} |" for name, (mean, low, high) in rows.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write ``qat.json`` and ``qat.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    start = time.perf_counter()
    result = measure(arguments.seeds)
    print(table(result))
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_text(arguments.output / "qat.json", json.dumps(result, indent=2) + "\n")
        write_text(arguments.output / "qat.md", table(result) + "\n")


if __name__ == "__main__":
    main()
