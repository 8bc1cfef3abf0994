"""Ctrl-C: one sentence, exit code 130, the terminal as it was, files whole or not there; and said which are there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import quant2e.files
from quant2e.cli.verbs import main
from quant2e.stages import OpenStage

ROOT = Path(__file__).parents[3]

CODE = """
import sys, time

def is_quantized(model):
    return any("quantize" in str(node.target) for node in model.graph.nodes)

def patient(model):
    if is_quantized(model):
        print("MEASURING", file=sys.stderr, flush=True)
        time.sleep(600)
    return 1.0

def counted(model):
    counted.calls = getattr(counted, "calls", -1) + 1
    if counted.calls == INTERRUPTED_IN:
        raise KeyboardInterrupt
    return 0.5 if is_quantized(model) else 1.0
"""

PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
from quant2e.cli import main
sys.exit(main())
"""

VERBS = {
    "quantize": "{model} --data {data} --target xnnpack -o a.pt2 --html a.html",
    "lower": "{quantized} --target onnx -o a.onnx",
    "tune": "{model} --data {data} --target xnnpack --evaluate metrics:counted --max-drop 1% -o a.pt2",
    "sensitivity": "{model} --data {data} --target xnnpack --html a.html",
    "compare": "{model} {quantized} --data {data} --html a.html",
    "verify": "{quantized} {quantized} --data {data}",
    "inspect": "{quantized} --html a.html",
}
NEEDED = {"lower": "onnxscript"}


@pytest.fixture
def named(folder, quantized, monkeypatch, tmp_path):
    """Fills in the files of a command, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "metrics", raising=False)
    names = {"model": folder / "model.pt2", "data": folder / "calib.npz", "quantized": quantized}
    return lambda text: text.format(**names).split()


def stopped(verb, arguments, capsys):
    """What it says of Ctrl-C; that its files are those that it names, whole."""
    assert main([verb, *arguments]) == 130
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith(f"quant2e {verb}: stopped by Ctrl-C"), captured.err
    assert "Traceback" not in captured.err
    there = {path.name for path in Path.cwd().iterdir()} - {"metrics.py", "__pycache__"}
    _, _, told = last.partition("; written before that, whole: ")
    assert there == set(told.split(", ") if told else ())
    return captured.out, there


def at_every_point(verb, arguments, capsys, monkeypatch):
    """Stops a verb where its first stage begins, where the next one does or a file is begun or in its place, and so on.

    Returns the files that were there each time.
    """
    found = []

    def stopping(function):
        def call(*args):
            nonlocal left
            result = function(*args)
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return result

        return call

    monkeypatch.setattr(OpenStage, "__init__", stopping(OpenStage.__init__))
    for name in ("_replaced", "_sync"):  # before a file is begun, and after it was moved into place
        monkeypatch.setattr(f"quant2e.files.{name}", stopping(getattr(quant2e.files, name)))
    while True:
        left = len(found)
        for path in Path.cwd().glob("a.*"):
            path.unlink()
        try:
            out, there = stopped(verb, arguments, capsys)
        except AssertionError:
            if left >= 0:  # it had no more such points, and came to its end
                return found
            raise
        assert out == ""
        found.append(there)


def test_quantize_stops_at_every_point(named, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    found = at_every_point("quantize", named(VERBS["quantize"]), capsys, monkeypatch)
    assert found[-4:] == [set(), {"a.pt2"}, {"a.pt2"}, {"a.pt2", "a.html"}]
    assert len(found) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in {"quantize", "tune"}])
def test_every_verb_stops_at_every_point(named, capsys, monkeypatch, verb):
    pytest.importorskip(NEEDED.get(verb, "matplotlib"))
    found = at_every_point(verb, named(VERBS[verb]), capsys, monkeypatch)
    assert len(found) >= (1 if verb == "verify" else 2)


@pytest.mark.parametrize("trials", [0, 1, 2])
def test_tune_writes_the_best_so_far_and_says_that_it_was_stopped(named, capsys, trials):
    """The first call is that of the float model; stopped there, or in the first trial, there is nothing to write."""
    Path("metrics.py").write_text(CODE.replace("INTERRUPTED_IN", str(trials)))
    arguments = named(VERBS["tune"])
    if trials < 2:
        out, there = stopped("tune", arguments, capsys)
        assert (out, there) == ("", set())
        return
    assert main(["tune", *arguments]) == 130
    captured = capsys.readouterr()
    assert "quant2e tune: stopped by Ctrl-C; this is the best of 1 trial(s)" in captured.err.splitlines()[-1]
    assert "1 trial by strategy 'sensitivity', interrupted" in captured.out
    assert "wrote a.pt2" in captured.out
    assert main(["inspect", "a.pt2"]) == 0


def test_quantize_with_a_metric_returns_nothing_that_was_cut_short(named, capsys):
    Path("metrics.py").write_text(CODE.replace("INTERRUPTED_IN", "2"))
    arguments = named("{model} --data {data} --target xnnpack --evaluate metrics:counted --max-drop 1% -o a.pt2")
    stopped("quantize", arguments, capsys)


# ------------------------------------------------------------------------------------------------ on a real terminal


def on_a_terminal(arguments, until, folder, *, group):
    """Runs a command on a terminal, and sends SIGINT once it shows ``until``: to it, or to all that it started."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=environment,
    )
    os.close(theirs)
    shown, sent, end = b"", False, time.monotonic() + 600
    while time.monotonic() < end:
        try:
            more = os.read(ours, 1 << 16)
        except OSError:  # the other side is closed
            break
        shown += more
        if not sent and until.encode() in shown:
            sent = True
            (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    os.close(ours)
    try:
        assert sent, shown[-2000:]
        return process.wait(60), shown.decode(errors="replace")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(
    ("command", "until"),
    [
        ("quantize {model} --data {data} --target xnnpack -o a.pt2", "calibrate"),
        ("tune {model} --data {data} --target xnnpack --evaluate metrics:patient -o a.pt2", "MEASURING"),
        ("bench {quantized} {quantized} --rounds 1000000000", "time programs 5/5"),
    ],
)
def test_on_a_terminal(named, tmp_path, command, until, group):
    pytest.importorskip("rich")
    Path("metrics.py").write_text(CODE)
    code, shown = on_a_terminal(named(command), until, tmp_path, group=group)
    verb = command.split()[0]
    assert code == 130, shown
    assert shown.count(f"quant2e {verb}: stopped by Ctrl-C") == 1, shown
    assert "Traceback" not in shown
    assert "ignored" not in shown
    assert shown.rfind("\x1b[?25h") >= shown.rfind("\x1b[?25l")  # the cursor is there
    assert {path.name for path in tmp_path.iterdir()} - {"metrics.py", "__pycache__"} == set()
