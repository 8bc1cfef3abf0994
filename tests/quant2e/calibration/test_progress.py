import io
import re
import sys

import pytest

from quant2e.calibration.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_a_bar_and_then_one_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with ProgressLine("calibrate", stream) as progress:
        progress(3, None)
        progress(12, 12)
    assert re.search(r"calibrate .*12/12", stream.getvalue())
    assert re.search(r"calibrate: 12 batches in \d+\.\d s\n$", stream.getvalue())


def test_without_rich_a_terminal_gets_the_lines_of_a_log(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    stream = Terminal()
    with ProgressLine("calibrate", stream) as progress:
        progress(12, 12)
    assert re.fullmatch(r"calibrate: 12 batches in \d+\.\d s\n", stream.getvalue())


def test_a_log_gets_one_line_per_phase():
    stream = io.StringIO()
    with ProgressLine("calibrate", stream) as progress:
        for i in range(100):
            progress(i + 1, 100)
    with pytest.raises(KeyError), ProgressLine("convert", stream):
        raise KeyError
    lines = stream.getvalue().splitlines()
    assert re.fullmatch(r"calibrate: 100 batches in \d+\.\d s", lines[0])
    assert re.fullmatch(r"convert: 0 batches in \d+\.\d s, stopped by KeyError", lines[1])
    assert len(lines) == 2
