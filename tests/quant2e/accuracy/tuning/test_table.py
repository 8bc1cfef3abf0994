"""The table of trials: live on a terminal, lines where rich is missing, nothing elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from quant2e.accuracy.tuning.space.space import Mix
from quant2e.accuracy.tuning.space.trial import TuningTrial
from quant2e.accuracy.tuning.table import TrialTable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def trials() -> list[TuningTrial]:
    return [
        TuningTrial(0, Mix(0, ("q",)), 0.5, False, True, (), 1.0, 100, 8.0, 0.1, None, 1.0),
        TuningTrial(1, Mix(0, ("float",)), None, False, True, ("a",), 0.0, 400, 32.0, 1.0, None, 1.0, "ValueError: no"),
        TuningTrial(2, Mix(0, ("float",)), 0.9, True, True, ("a",), 0.0, 400, 32.0, 1.0, None, 1.0),
    ]


def shown(stream: io.StringIO) -> str:
    with TrialTable(stream) as table:
        for trial in trials():
            table(trial)
    return stream.getvalue()


def test_a_terminal_shows_a_table():
    pytest.importorskip("rich")
    text = shown(Terminal())
    assert "3 trials; the goal is met" in text
    assert "MACs" in text


def test_a_terminal_without_rich_shows_lines(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    lines = shown(Terminal()).splitlines()
    assert lines[0].startswith("trial 0: metric 0.5, not met; 100.0% of MACs on int8, 100 bytes")
    assert "no metric (ValueError: no)" in lines[1]


def test_a_file_shows_nothing():
    assert shown(io.StringIO()) == ""
