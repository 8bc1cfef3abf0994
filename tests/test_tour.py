"""The walk in docs/tour.py, run from start to end."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

TOUR = Path(__file__).parents[1] / "docs" / "tour.py"


def test_the_tour_runs_and_shows_every_stop(tmp_path, capsys):
    result = runpy.run_path(str(TOUR), run_name="tour")["main"](tmp_path)
    printed = capsys.readouterr().out
    stops = [line.removeprefix("--- ").split(".")[0] for line in printed.splitlines() if line.startswith("--- ")]
    assert stops == ["1", "3", "5", "6", "7", "8", "9"]
    assert "equal bit for bit ---\nTrue" in printed
    assert "'head'" in printed.split("--- 9.")[1]  # the near miss of 'haed'
    assert str(result.report) in printed
    assert torch.isfinite(result(torch.randn(2, 3, 16, 16))).all()
    assert {path.name for path in tmp_path.iterdir()} == {"tour_int8.pt2", "tour_int8.pte"}
