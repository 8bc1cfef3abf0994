"""The peers' benchmark without an engine: processes, what they say when they fail, ratios, the table."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import process, table
from benchmarks.peers.process import Worker, WorkerError, build, environment
from benchmarks.peers.table import Row, lines, means, ratio, sqnr_db
from benchmarks.peers.worker import Job, Loaded, answer, peak_memory, reason, timed

ENGINE = """
import os, sys
from pathlib import Path
import numpy as np
from benchmarks.peers.worker import Loaded

def build(job):
    job.file(".bin").write_bytes(b"program")
    return 2.5

def load(job):
    print("engines talk")
    threads = float(os.environ["OMP_NUM_THREADS"])
    return Loaded(call=lambda: threads, first=np.array, version="made up 1", files=(job.file(".bin"),), seconds=1.5)

def breaks(job):
    raise RuntimeError("outer") from KeyError("inner")

def dies(job):
    sys.stderr.write("last words")
    os._exit(3)

def stuck(job):
    import time
    time.sleep(60)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "made_up_engine.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Job(engine="made up!", build="made_up_engine:build", load="made_up_engine:load", model="M", batch=1,
        threads=2,
               folder=str(tmp_path))  # fmt: skip


def test_a_worker_builds_once_loads_and_runs(job, tmp_path):
    python, log = [sys.executable], tmp_path / "log"
    assert build(python, job, log, 60) == 2.5
    assert build(["no such interpreter"], job, log, 60) == 2.5  # known by now
    with Worker(python, job, "serve", log) as worker:
        assert worker.wait(60) == {"seconds": 1.5, "bytes": 7, "version": "made up 1"}
        times = worker.ask({"run": 0.01, "most": 3}, 60)["times"]
        assert 1 <= len(times) <= 3
        assert worker.ask({"output": str(tmp_path / "out.npy")}, 60)["peak"] > 1e6
    assert np.load(tmp_path / "out.npy") == 2.0  # threads, by the environment
    assert "engines talk" in log.read_text()


@pytest.mark.parametrize(
    ("function", "said", "seconds"),
    [
        ("breaks", "^RuntimeError: outer, because of KeyError: 'inner'$", 60),
        ("dies", "^ended with exit code 3: last words$", 60),
        ("missing", "^AttributeError: module 'made_up_engine' has no attribute 'missing'$", 60),
        ("stuck", "^no answer within 0 s$", 0.4),
    ],
)
def test_a_worker_that_fails_says_why(job, tmp_path, function, said, seconds):
    broken = replace(job, load=f"made_up_engine:{function}")
    with Worker([sys.executable], broken, "serve", tmp_path / "log") as worker, pytest.raises(WorkerError, match=said):
        worker.wait(seconds)


def test_no_worker_is_started_when_memory_is_short(job, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "available_memory", lambda: 1e9)
    with pytest.raises(WorkerError, match=r"not started: only 1\.0 GB of memory are available"):
        Worker([sys.executable], job, "serve", tmp_path / "log")


def test_the_environment_fixes_the_number_of_threads():
    assert {environment(3)[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} == {"3"}


def test_times_leave_out_the_first_call():
    calls = []
    assert len(timed(lambda: calls.append(1), 0, 50)) == 1
    assert len(calls) == 2
    assert len(timed(lambda: None, 60, 5)) == 5


def test_answers(tmp_path):
    program = Loaded(call=lambda: [3, 4], first=np.array, version="")
    assert answer(program, {"output": str(tmp_path / "x.npy")})["peak"] <= peak_memory()
    assert np.load(tmp_path / "x.npy").tolist() == [3, 4]
    assert reason(ValueError("a\nb")) == "ValueError: a"


# ------------------------------------------------------------------------------------------------------------ tables


def row(engine, *times, model="M", batch=1, **more):
    return Row(model=model, batch=batch, threads=1, engine=engine, times=times, **more)


ROWS = [
    row("float eager", 8.0, 8.0, 16.0, sqnr_db=math.inf),
    row("ours → Inductor", 4.0, 2.0, 4.0, sqnr_db=20.0, size=2_500_000, seconds=3.0, peak=10_000_000, limit=1.0),
    row("float eager", 9.0, model="N"),
    row("ours → Inductor", 1.0, model="N"),
    Row(model="N", batch=1, threads=1, engine="OpenVINO float", failed="no | pipe"),
]


def test_ratios_are_medians_over_rounds():
    assert ratio(ROWS[0], ROWS[1]) == 4.0
    assert ratio(ROWS[0], None) is None
    assert ratio(ROWS[4], ROWS[3]) is None
    found = {(mean.ours, mean.peer): mean for mean in means(ROWS)}
    assert list(found) == [("ours → Inductor", "float eager")]
    mean = found["ours → Inductor", "float eager"]
    assert (mean.mean, mean.settings, mean.worst, mean.where) == (pytest.approx(6.0), 2, 4.0, ("M", 1, 1))


def test_lines_have_every_number_and_every_failure():
    made = list(lines(ROWS))
    assert {len(line) for line in made} == {len(table.HEADS)}
    assert made[1] == (
        "M",
        "1",
        "1",
        "ours → Inductor",
        "4.00",
        "4.00 ×",
        "–",
        "1.00 ×",
        "–",
        "–",
        "25%",
        "20.0",
        "2.5",
        "3.0",
        "10",
    )
    assert made[0][11] == "bit-equal"
    assert made[4][4] == r"failed: no \| pipe"


def test_rows_survive_the_file_and_a_run_keeps_those_of_others(tmp_path):
    where = peers.machine()
    peers.write(tmp_path / "p", ROWS, where)
    stored = json.loads((tmp_path / "p.json").read_text())
    assert [Row.from_plain(each) for each in stored["rows"]] == ROWS
    assert stored["rows"][1]["ms"] == 4.0
    assert list(peers.kept(tmp_path / "p", where).values()) == ROWS
    assert peers.kept(tmp_path / "p", replace(where, cpu="another")) == {}
    text = (tmp_path / "p.md").read_text()
    assert "ours → Inductor is 6.00 × as fast as float eager: geometric mean of 2 setting(s)" in text


@pytest.mark.parametrize(
    ("output", "expected"),
    [([3.0, 4.0], math.inf), ([3.0, 4.5], 20.0), ([math.nan, 4.0], math.nan), ([3.0], math.nan)],
)
def test_signal_to_noise(output, expected):
    assert sqnr_db(np.array(output), np.array([3.0, 4.0])) == pytest.approx(expected, nan_ok=True)


def test_engines_name_functions_that_exist():
    for engine in peers.ENGINES.values():
        for name in filter(None, (engine.load, engine.build)):
            module, _, function = name.partition(":")
            assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_a_setting_has_a_row_for_each_engine_also_for_those_that_fail(job, tmp_path, monkeypatch):
    np.save(tmp_path / "reference.npy", np.array(2.0))
    (tmp_path / "macs.txt").write_text("1000000")
    works = peers.Engine(load=job.load, build=job.build)
    monkeypatch.setattr(peers, "ENGINES", {"works": works, "breaks": peers.Engine(load="made_up_engine:breaks"),
                                           "not exported": replace(works, exported=True)})  # fmt: skip
    monkeypatch.setattr(peers, "SECONDS", 0.001)
    with peers.Phases(peers.Console(quiet=True)) as phases:
        rows = peers.setting(job, list(peers.ENGINES), 2, WorkerError("no ONNX"), phases)
    assert [(r.engine, r.failed, len(r.times)) for r in rows] == [
        ("works", "", 2),
        ("breaks", "RuntimeError: outer, because of KeyError: 'inner'", 0),
        ("not exported", "the float model is not exported as ONNX: no ONNX", 0),
    ]
    assert (rows[0].sqnr_db, rows[0].size, rows[0].seconds) == (math.inf, 7, 2.5)
    assert 0 < rows[0].limit < 1e-2  # milliseconds of a million products
