"""Trials on one storage: killed runs go on, processes share the work, and what is of something else is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import quant2e
from quant2e.accuracy.tuning import shared_store
from quant2e.accuracy.tuning.shared_store import SharedStore
from quant2e.accuracy.tuning.space.space import Family, Mix, Space, TunedGroup
from quant2e.accuracy.tuning.space.trial import TuningTrial
from quant2e.errors import Quant2eError
from quantizers import XNNPACKQuantizer
from tests.quant2e.accuracy.tuning import shared_worker

optuna = pytest.importorskip("optuna")

ROOT = Path(__file__).parents[4]
GROUPS = tuple(TunedGroup((name,), (), frozenset({name}), ("int8",)) for name in "abc")
SPACE = Space((Family((), GROUPS),))
ABOUT = {"model": "m", "quantizer": "q", "data": "d"}
FIRST, SECOND = Mix(0, ("int8", "int8", "int8")), Mix(0, ("float", "int8", "int8"))


def trial(number: int, mix: Mix) -> TuningTrial:
    return TuningTrial(number, mix, 0.5, True, True, ("a",), 0.5, 100, 8.0, 0.25, None, 1.0)


OPENED: list[SharedStore] = []


@pytest.fixture(autouse=True)
def claims_end_with_their_test():
    """Or their signs of life go on in this process, where other tests watch what it opens."""
    yield
    while OPENED:
        store = OPENED.pop()
        for number in list(store._claims):
            store.abandon(number)


def opened(storage, **about: str) -> SharedStore:
    OPENED.append(SharedStore(storage, "study", {**ABOUT, **about}, SPACE))
    return OPENED[-1]


def journal(folder: Path):
    return str(folder / "trials.log")


def test_what_is_finished_is_seen_by_all(tmp_path):
    one, other = opened(journal(tmp_path)), opened(journal(tmp_path))
    number, mix = one.claim([FIRST])
    one.finish(trial(number, mix))
    assert dict(other.finished()) == {FIRST: trial(number, FIRST)}


def test_a_mix_is_claimed_once_and_may_be_given_back(tmp_path):
    one, other = opened(journal(tmp_path)), opened(journal(tmp_path))
    other._owner["pid"] = os.getppid()  # another process, which runs
    number, _ = one.claim([FIRST, SECOND])
    assert other.claim([FIRST, SECOND])[1] == SECOND
    assert other.claim([FIRST, SECOND]) is None
    one.abandon(number)
    assert other.claim([FIRST, SECOND])[1] == FIRST


def test_the_claim_of_a_dead_process_is_free(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    dead, alive = opened(journal(tmp_path)), opened(journal(tmp_path))
    dead._owner["pid"] = gone.pid
    number, _ = dead.claim([FIRST])
    assert alive.claim([FIRST])[1] == FIRST
    dead.finish(trial(number, FIRST))  # it was not dead: what it found is kept
    assert FIRST in alive.finished()


def test_the_claim_of_another_machine_is_free_when_it_gives_no_sign(tmp_path, monkeypatch):
    far, near = opened(journal(tmp_path)), opened(journal(tmp_path))
    far._owner["host"] = "elsewhere"
    far.claim([FIRST])
    assert near.claim([FIRST]) is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61.0)
    assert near.claim([FIRST])[1] == FIRST


def test_an_ended_claim_gives_no_more_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_store, "_HEARTBEAT", 0.01)
    store, before = opened(journal(tmp_path)), set(threading.enumerate())
    numbers = [store.claim([mix])[0] for mix in (FIRST, SECOND)]
    beating = set(threading.enumerate()) - before
    assert len(beating) == 2
    store.abandon(numbers[0])
    store.finish(trial(numbers[1], SECOND))
    for thread in beating:
        thread.join(timeout=60.0)
        assert not thread.is_alive()


@pytest.mark.parametrize("part", ABOUT)
def test_a_storage_of_something_else_is_refused(part):
    storage = optuna.storages.InMemoryStorage()
    opened(storage)
    with pytest.raises(Quant2eError, match=f"has trials with another {part}"):
        opened(storage, **{part: "other"})


def test_what_is_no_storage():
    with pytest.raises(Quant2eError, match="storage is a int: the path of a journal file"):
        opened(3)


def test_a_run_goes_on_where_it_was_and_evaluates_nothing_again(tmp_path):
    storage, log = journal(tmp_path), tmp_path / "log"
    first = shared_worker.run(storage, str(log), 0.0, max_trials=3)
    assert first.stopped == "stopped after max_trials=3"
    whole = shared_worker.run(storage, str(log), 0.0, max_trials=6)
    assert len(whole.trials) == 6
    assert whole.trials[:3] == first.trials
    assert len(log.read_text().splitlines()) == 1 + 6
    stricter = shared_worker.run(storage, str(log), 0.0, max_trials=6, max_drop=0.0)
    assert not stricter.met  # the same trials, by another goal
    assert len(log.read_text().splitlines()) == 1 + 6
    study = optuna.load_study(study_name="quant2e", storage=optuna.storages.get_storage(_journal(storage)))
    assert len(study.trials_dataframe()) == 6


def _journal(path: str):
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))


def test_other_data_and_another_model_are_refused(tmp_path):
    storage, net, data = journal(tmp_path), shared_worker.model(), shared_worker.batches()
    shared_worker.run(storage, str(tmp_path / "log"), 0.0, max_trials=1)
    quantizer = XNNPACKQuantizer().set_global("w8a8-tensor")
    changed = shared_worker.model()
    changed[0].bias.data += 1.0
    for model, batches, part in ((net, data[:2], "data"), (changed, data, "model")):
        with pytest.raises(Quant2eError, match=f"another.*{part}"):
            quant2e.tune(model, data[:1], quantizer, batches, lambda m: 1.0, storage=storage, max_trials=1)


@pytest.mark.slow
def test_a_database(tmp_path):
    storage, log = f"sqlite:///{tmp_path / 'trials.db'}", tmp_path / "log"
    for _ in range(2):
        result = shared_worker.run(storage, str(log), 0.0, max_trials=2)
    assert len(result.trials) == 2
    assert len(log.read_text().splitlines()) == 1 + 2


@pytest.mark.slow
def test_of_two_processes_one_is_killed_and_the_other_finishes(tmp_path):
    storage, log = journal(tmp_path), tmp_path / "log"
    command = [sys.executable, "-m", "tests.quant2e.accuracy.tuning.shared_worker", storage, str(log), "0.5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(2)]
    try:
        deadline = time.monotonic() + 240.0
        while len(_evaluated(log)) < 5 and time.monotonic() < deadline:
            time.sleep(0.1)
        workers[0].kill()
        workers[0].wait()
        assert workers[1].wait(timeout=240.0) == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    times = Counter(_evaluated(log))
    assert len(times) == 16  # every mix, the float model among them
    assert (
        sum(times.values()) <= 16 + 2 + 1
    )  # both may have begun with the float model; one trial died with its process
    result = shared_worker.run(storage, str(log), 0.0)
    assert len(result.trials) == 16
    assert Counter(_evaluated(log)) == times
    assert result.met
    assert torch.equal(result.model(shared_worker.batches()[0]), result.model(shared_worker.batches()[0]))


def _evaluated(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []
