"""docs/tuning.md: its code runs, on the model of docs/accuracy.md, and keeps the goal."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

import quant2e
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.test_accuracy_page import Net

PAGE = Path(__file__).parents[1] / "docs/tuning.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, object]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Net().eval()
    batches = [torch.randn(16, 16, generator=generator) for _ in range(9)]
    images = [torch.randn(16, 16, generator=generator) for _ in range(8)]
    for optional in ("optuna", "scipy"):
        pytest.importorskip(optional)
    found: dict[str, object] = {
        "quant2e": quant2e,
        "torch": torch,
        "time": time,
        "folder": tmp_path_factory.mktemp("storage"),
        "model": model,
        "batches": batches,
        "images": images,
        "labels": [model(x).argmax(1) for x in images],
        "example": (batches[0],),
        "quantizer": XNNPACKQuantizer().set_global(get_symmetric_quantization_config()),
    }
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), found)
    return found


def test_the_goal_is_kept(names):
    result = names["result"]
    assert result.met
    assert result.metric >= 0.98
    assert names["evaluate"](result.model.module) == pytest.approx(result.metric)


def test_alternatives_are_chosen_between(names):
    mixed = names["mixed"]
    assert mixed.met
    assert set(mixed.choices.values()) <= set(names["choices"])
    assert mixed.best.work <= names["result"].best.work


def test_budgets_are_kept(names):
    assert names["small"].best.size_bytes <= 6000
    assert names["small"].best.int8_share >= 0.5
    assert names["timed"].best.latency < 5.0


def test_a_second_run_finds_the_trials_of_the_first(names):
    again = names["again"]
    assert [trial.mix for trial in again.trials] == [trial.mix for trial in names["result"].trials]
