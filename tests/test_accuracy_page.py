"""docs/accuracy.md: its code runs, finds the layer that was built to hurt, and mends it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import quant2e
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

PAGE = Path(__file__).parents[1] / "docs/accuracy.md"


class Net(nn.Module):
    """Four linear layers; the rows of the third span two decades, which the fourth undoes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
        )
        spread = torch.logspace(-1.0, 1.0, 32)
        with torch.no_grad():
            self.layers[4].weight *= spread[:, None]
            self.layers[4].bias *= spread
            self.layers[6].weight /= spread

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def names() -> dict[str, object]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(16, 16, generator=generator) for _ in range(9)]
    found: dict[str, object] = {
        "quant2e": quant2e,
        "model": Net().eval(),
        "batches": batches,
        "example": (batches[0],),
        "quantizer": XNNPACKQuantizer().set_global(get_symmetric_quantization_config()),
    }
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), found)
    return found


def test_the_layer_is_found(names):
    assert any("layers.4" in place.module or "layers.6" in place.module for place in names["comparison"].rows[:2])
    assert {"layers.4", "layers.6"} & set(names["costliest"].modules)


def test_it_is_mended(names):
    result, better, also_better = (names[name].report for name in ("result", "better", "also_better"))
    assert better.sqnr_db > result.sqnr_db
    assert also_better.sqnr_db > result.sqnr_db + 15.0
    assert names["equalized"].report.sqnr_db > result.sqnr_db + 13.0
    assert names["mended"].report.sqnr_db >= max(names["equalized"].report.sqnr_db, result.sqnr_db + 13.0)
    assert {step.name: step.outcome for step in names["mended"].report.algorithms}["equalize"] == "kept"
    assert quant2e.report_of(names["converted"]).algorithms[-1].changes
    assert set(names["channels_left"](names["captured"])) == {"linear_3"}


def test_the_search_keeps_its_goal(names):
    assert names["tuned"].met
    assert names["tuned"].metric >= -0.001
