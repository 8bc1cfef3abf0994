"""Stages: shown on a terminal while they run, told to loggers everywhere, and quiet when asked."""

import io
import logging
import re
import signal
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import quant2e
from quant2e.errors import Quant2eError
from quant2e.isolation import unheard
from quant2e.stages import VARIABLE, heard, quiet_progress, quiet_where_told, shown, stage
from quantizers import XNNPACKQuantizer


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    pytest.importorskip("rich")
    made = Terminal()
    own = SimpleNamespace(stderr=made, unraisablehook=sys.unraisablehook)
    monkeypatch.setattr("quant2e.stages.sys", own)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return made


def lines(caplog):
    return [re.sub(r" in [\d.]+ s$", "", record.getMessage()) for record in caplog.records if "stages" in record.name]


def test_open_stages_stand_on_one_line_with_how_far_they_are(terminal, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "quant2e.stages._Display.draw", lambda display: drawn.append(" › ".join(map(str, display.stages)))
    )
    with stage("lower"), stage("compare") as told:
        told(1, 3)
        told(2)
    assert drawn == ["lower", "lower › compare", "lower › compare 1/3", "lower › compare 2", "lower"]


def test_the_name_is_on_the_terminal_and_goes(terminal):
    with stage("calibrate"):
        pass
    said = terminal.getvalue()
    assert "calibrate" in said
    assert said.endswith(("\x1b[2K", "\x1b[?25h\r\x1b[1A\x1b[2K"))


def test_loggers_are_told_everywhere_also_of_what_failed(caplog):
    caplog.set_level(logging.INFO, "quant2e")

    def fail():
        with stage("outer"), stage("inner") as told:
            told(1, 2)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert lines(caplog) == ["inner 1/2: stopped", "outer: stopped"]


@pytest.mark.parametrize("how", ["variable", "argument", "context", "no terminal"])
def test_quiet(terminal, monkeypatch, how):
    if how == "variable":
        monkeypatch.setenv(VARIABLE, "0")
    if how == "no terminal":
        monkeypatch.setattr(terminal, "isatty", lambda: False)

    @quiet_where_told
    def work(*, progress=None):
        with stage("work"):
            return shown()

    if how == "context":
        with quiet_progress():
            assert not work()
    else:
        assert not work(progress=False if how == "argument" else None)
    assert terminal.getvalue() == ""
    if how in {"argument", "context"}:
        assert work(progress=True)
        assert "work" in terminal.getvalue()


def test_the_stages_of_quantize(terminal, caplog):
    caplog.set_level(logging.INFO, "quant2e")
    quantizer = XNNPACKQuantizer().set_global("w8a8")
    data = [torch.randn(4, 8) for _ in range(4)]
    model, counts = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), []
    quant2e.quantize(model, (data[0],), quantizer, data, progress=lambda done, total: counts.append((done, total)))
    assert counts == [(1, 3), (2, 3), (3, 3)]
    assert terminal.getvalue() == ""
    said = lines(caplog)
    assert [line for line in said if line in {"capture: done", "calibrate 3/3: done", "convert: done"}] == [
        "capture: done",
        "calibrate 3/3: done",
        "convert: done",
    ]
    quant2e.quantize(model, (data[0],), quantizer, data)
    assert "calibrate" in terminal.getvalue()


def test_what_libraries_write_is_not_on_the_screen(capfd, caplog):
    caplog.set_level(logging.DEBUG, "quant2e.isolation")
    with unheard("testing"):
        print("from Python")
        import os

        os.write(2, b"from C++\n")
    print("heard")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("heard\n", "")
    (record,) = [one for one in caplog.records if one.name == "quant2e.isolation"]
    assert "from Python" in record.getMessage()
    assert "from C++" in record.getMessage()
    with pytest.raises(ImportError, match="no such"), unheard("failing"):
        raise ImportError("no such thing")


@pytest.mark.slow
@pytest.mark.inductor
def test_a_program_that_is_compiled_again_says_so(caplog):
    import lowering

    caplog.set_level(logging.INFO, "quant2e")
    data = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    quantizer = XNNPACKQuantizer().set_global("w8a8")
    result = quant2e.quantize(model, (data[0],), quantizer, data, dynamic_batch=64)
    program = lowering.to_inductor(result, verify=False)
    for size in (1, 4, 32):
        program(torch.randn(size, 3, 8, 8))
    again = [line for line in lines(caplog) if line.startswith("compile again for input.shape[0] = ")]
    assert len(again) == len(program._runs) - sum(run is program._general for run in program._runs.values())


def test_who_hears_of_progress(terminal):
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    data = [torch.randn(2, 4) for _ in range(2)]
    prepared = quant2e.prepare_pt2e(quant2e.capture(model, (data[0],)), XNNPACKQuantizer().set_global("w8a8"))
    quant2e.calibrate(prepared, data, progress=False)
    assert "calibrate" not in terminal.getvalue()
    quant2e.calibrate(prepared, data, progress=True)
    assert "calibrate" in terminal.getvalue()
    assert [heard(told) for told in (None, True, False)] == [None, None, None]
    assert heard(print) is print
    for call in (heard, lambda progress: quant2e.calibrate(prepared, data, progress=progress)):
        with pytest.raises(Quant2eError, match="progress is a int: False, or a function"):
            call(5)


LOWERINGS = ["to_executorch", "to_inductor", "package_inductor", "to_onnx", "to_openvino", "to_native"]


@pytest.mark.parametrize("name", LOWERINGS)
@pytest.mark.parametrize(
    "told", [0, 1, "no", [], print, lambda done, total: None], ids=["0", "1", "text", "list", "print", "lambda"]
)
def test_a_lowering_takes_no_other_progress_than_true_and_false(terminal, name, told):
    import lowering

    with pytest.raises(Quant2eError, match=f"{name}: progress is a (int|str|list|function): None or True shows"):
        getattr(lowering, name)(None, progress=told)


@pytest.mark.parametrize("name", LOWERINGS)
def test_every_lowering_is_quiet_when_told(terminal, name):
    import lowering

    lower = getattr(lowering, name)
    arguments = {"path": "nowhere/a.txt"} if "path" in lower.__annotations__ else {}
    with pytest.raises(quant2e.Quant2eError):
        lower(None, progress=False, **arguments)
    assert terminal.getvalue() == ""
    with pytest.raises(quant2e.Quant2eError):
        lower(None, **arguments)
    assert terminal.getvalue() != ""


class Interrupts:
    """Interrupts the process when it is collected, where Python can raise nothing."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interruptible():
    """Python's own handler: shells start what runs in the background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("nested", [False, True])
def test_an_interrupt_that_python_loses_ends_a_stage_all_the_same(nested, interruptible):
    usual, end = sys.unraisablehook, time.monotonic() + 30

    def work(until):
        with stage("work"), stage("more") if nested else nullcontext():
            gone = Interrupts()
            del gone
            while time.monotonic() < until:
                pass

    with pytest.raises(KeyboardInterrupt):
        work(end)
    assert time.monotonic() < end
    with pytest.raises(KeyboardInterrupt):  # it would have ended before the interrupt comes again
        work(0)
    assert sys.unraisablehook is usual


def test_what_else_cannot_be_raised_is_told_as_ever(monkeypatch):
    class Fails:
        def __del__(self):
            raise ValueError("of the user's")

    told = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: told.append(str(unraisable.exc_value)))
    with stage("work"):
        gone = Fails()
        del gone
    assert told == ["of the user's"]
