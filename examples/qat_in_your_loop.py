"""Quantization-aware training in a loop of your own: three calls are different from training in float."""

from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import nn
from torch.nn import functional as F

import quant2e
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

STEPS = 30


def data(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of a plane ``[count, 2]``, and whether each lies in the ring."""
    points = torch.randn(count, 2)
    radius = points.norm(dim=1)
    return points, ((radius > 0.7) & (radius < 1.5)).long()


def accuracy(model: nn.Module, points: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of ``points`` that ``model`` puts on the right side."""
    with torch.no_grad():
        return float((model(points).argmax(1) == labels).float().mean())


def train(model: nn.Module, points: torch.Tensor, labels: torch.Tensor, rate: float, steps: int) -> None:
    """The loop, as it was before."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(points), labels).backward()
        optimizer.step()


def main(folder: Path) -> tuple[float, float]:
    """Write ``ring_int8.pt2`` to ``folder``; return the accuracy in float, and of the trained integers."""
    torch.manual_seed(0)
    points, labels = data(512)
    held_out = data(512)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    train(model, points, labels, 0.02, 8 * STEPS)
    in_float = accuracy(model, *held_out)

    captured = quant2e.capture(model.train(), (points,))  # 1: ATen ops
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=True))
    prepared = quant2e.prepare_qat_pt2e(captured, quantizer)  # 2: fake quantization, in parameters of its own
    train(prepared, points, labels, 0.002, STEPS)
    prepared.eval()
    converted = quant2e.convert_pt2e(prepared)  # 3: integers
    quant2e.save(converted, folder / "ring_int8.pt2", (points,))

    trained = accuracy(converted, *held_out)
    print(f"accuracy: float {in_float:.1%}, int8 after training {trained:.1%}")
    return in_float, trained


if __name__ == "__main__":
    main(Path(mkdtemp()))
