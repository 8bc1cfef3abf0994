"""One process of several that tune one model on one storage: ``python shared_worker.py STORAGE LOG SECONDS``.

Every evaluation appends the picks that it evaluates to LOG, and takes SECONDS more than it needs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

import quant2e
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config


def model() -> nn.Module:
    """Four linears, of which two lose much."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    for index in (1, 2):
        net[index].weight.data *= torch.logspace(-1.0, 1.0, 8)[:, None]
    return net.eval()


def batches() -> list[torch.Tensor]:
    """The same in every process."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 8, generator=generator) for _ in range(4)]


def run(storage: str, log: str, seconds: float, **arguments: object) -> quant2e.TuningResult:
    """Tune, and write down each evaluation."""
    net, data = model(), batches()
    wanted = net(data[0]).detach()

    def evaluate(module) -> float:
        quantized = sorted(node.name for node in module.graph.nodes if "quantize" in str(node.target))
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(" ".join(quantized) + "\n")
        time.sleep(seconds)
        return 1.0 - float((module(data[0]) - wanted).norm() / wanted.norm())

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    given = {"max_drop": 0.02, "strategy": "exhaustive", **arguments}
    return quant2e.tune(net, data[:1], quantizer, data, evaluate, storage=storage, progress=False, **given)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], float(sys.argv[3]))
