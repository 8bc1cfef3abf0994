import io
import re

import pytest

from quant2e.calibration.progress import ProgressLine, clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_terminal_sees_what_is_left():
    stream = Terminal()
    with ProgressLine("calibrate", stream) as progress:
        progress(3, 12)
        assert progress.line(6.0) == "calibrate: ██████·················· 3/12, 0:06, 0:18 left"
        progress(4, None)
        assert progress.line(6.0) == "calibrate: 4 batches, 0:06"
        progress(12, 12)
    assert "\r\033[Kcalibrate: ████████████████████████ 12/12" in stream.getvalue()
    assert re.search(r"\r\033\[Kcalibrate: 12 batches in \d+\.\d s\n$", stream.getvalue())


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
