"""Many nodes and many batches: what they take, as JSON.

``python -m tests.load.many nodes --count 1250`` prints the seconds of CPU that prepare and convert take on a graph of
four times as many nodes, weights and biases among them; ``python -m tests.load.many batches --count 10000`` the
resident bytes while that many batches pass.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import quant2e
from quantizers import XNNPACKQuantizer
from tests.load.decoder import resident

EVERY = 1000
"""Batches between two looks at the memory."""


def quantizer() -> XNNPACKQuantizer:
    """Static, per channel."""
    return XNNPACKQuantizer().set_global("w8a8")


def deep(count: int) -> nn.Sequential:
    """``count`` linears, each followed by an activation that is an op of its own."""
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(count) for part in (nn.Linear(8, 8), nn.Tanh()))).eval()


def nodes(count: int) -> dict[str, float]:
    """Quantize a graph of ``2 * count`` ops, step by step."""
    inputs = (torch.randn(4, 8),)
    captured = quant2e.capture(deep(count), inputs)
    began = time.process_time()
    prepared = quant2e.prepare_pt2e(captured, quantizer())
    middle = time.process_time()
    quant2e.calibrate(prepared, [inputs])
    ready = time.process_time()
    converted = quant2e.convert_pt2e(prepared)
    ended = time.process_time()
    return {
        "ops": 2 * count,
        "nodes": len(captured.graph.nodes),
        "quantized": quant2e.report_of(converted).quantized_ops,
        "prepare": middle - began,
        "convert": ended - ready,
    }


def batches(count: int) -> dict[str, list[int]]:
    """Quantize a small network on ``count`` batches that are made one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    seen: list[int] = []

    def data() -> Iterator[Tensor]:
        stream = torch.Generator().manual_seed(1)
        for number in range(count):
            if number % EVERY == EVERY - 1:
                seen.append(resident())
            yield torch.randn(8, 3, 8, 8, generator=stream) * (1 + number / count)

    quant2e.quantize(model, (torch.randn(8, 3, 8, 8),), quantizer(), data())
    return {"resident": seen}


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.many", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("nodes", "batches"))
    parser.add_argument("--count", type=int, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    json.dump({"nodes": nodes, "batches": batches}[asked.what](asked.count), sys.stdout)


if __name__ == "__main__":
    main()
