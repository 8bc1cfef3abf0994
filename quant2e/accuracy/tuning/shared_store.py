"""Shared trials: a store that any number of processes and machines work on, and that outlives them: an Optuna storage.

A mix is claimed by a running trial that names its owner. Of two claims of one mix the one with the lower number holds,
which both owners see, since each looks again after it has written. An owner is gone when its process is (on this
machine), or when its heartbeat stands still: then its claim is marked as failed, and the mix is free.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quant2e.accuracy.tuning.optuna_import import optuna_module, without_optuna_log
from quant2e.accuracy.tuning.sampling import distributions_of, parameters_of, score_of
from quant2e.accuracy.tuning.space.goal import Goal
from quant2e.accuracy.tuning.space.space import Mix, Space
from quant2e.accuracy.tuning.space.trial import TuningTrial
from quant2e.accuracy.tuning.store import TrialStore
from quant2e.errors import Quant2eError

_HEARTBEAT = 5.0
"""Seconds between two signs of life of whoever evaluates a mix."""

_SILENCE = 60.0
"""Seconds without one after which its claim is void."""

_ABOUT, _MIX, _OWNER, _ALIVE, _TRIAL = "quant2e", "mix", "owner", "alive", "trial"


def opened_storage(storage: Any) -> Any:
    """An Optuna storage: ``storage`` itself, a database by its URL, or a journal file by its path."""
    optuna = optuna_module()
    if isinstance(storage, str | Path) and "://" not in str(storage):
        backend = optuna.storages.journal.JournalFileBackend(str(storage))
        return optuna.storages.JournalStorage(backend)
    if isinstance(storage, str):
        return optuna.storages.get_storage(storage)
    if isinstance(storage, optuna.storages.BaseStorage):
        return optuna.storages.get_storage(storage)
    raise Quant2eError(
        f"storage is a {type(storage).__name__}: the path of a journal file, the URL of a database or a storage of "
        "Optuna"
    )


@dataclass(slots=True)
class _Claim:
    """What this process holds: the trial in the storage, and the thread that gives signs of life."""

    trial_id: int
    over: threading.Event = field(default_factory=threading.Event)


class SharedStore(TrialStore):
    """``about``: what the trials are of, by part (model, quantizers, data), as digests.

    Raises `Quant2eError` for a study that is of something else.
    """

    def __init__(self, storage: Any, study: str, about: Mapping[str, str], space: Space) -> None:
        optuna = optuna_module()
        self._space = space
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._claims: dict[int, _Claim] = {}
        self._seen: dict[int, tuple[Any, float]] = {}
        self._goal: Goal | None = None
        with without_optuna_log():
            self._storage = opened_storage(storage)
            self._study = optuna.create_study(
                storage=self._storage, study_name=study, load_if_exists=True, direction="minimize"
            )
            self._id = self._storage.get_study_id_from_name(study)
            found = self._storage.get_study_user_attrs(self._id).get(_ABOUT)
            if found is None:
                self._storage.set_study_user_attr(self._id, _ABOUT, dict(about))
            elif found != dict(about):
                other = [part for part in about if found.get(part) != about[part]]
                raise Quant2eError(
                    f"the study '{study}' in this storage has trials with another {' and another '.join(other)}: give "
                    "another storage= or study=, or call tune as it was called then (data in the same order)"
                )

    def float_metric(self, measure: Any) -> float:
        """The metric of the float model: what whoever began the study measured, else ``measure()``."""
        found = self._storage.get_study_user_attrs(self._id).get("float_metric")
        if found is None:
            found = measure()
            with without_optuna_log():
                self._storage.set_study_user_attr(self._id, "float_metric", found)
        return float(found)

    def judge_by(self, goal: Goal) -> None:
        """The goal by which values of trials are computed that Optuna's own tools show."""
        self._goal = goal

    def _all(self) -> Sequence[Any]:
        with without_optuna_log():
            found: Sequence[Any] = self._storage.get_all_trials(self._id, deepcopy=False)
        return found

    def finished(self) -> Mapping[Mix, TuningTrial]:
        done: dict[Mix, TuningTrial] = {}
        for one in self._all():
            if one.state.name == "COMPLETE" and _TRIAL in one.user_attrs:
                trial = _read(one.user_attrs[_TRIAL])
                done.setdefault(trial.mix, replace(trial, number=one.number))
        return done

    def claim(self, mixes: Sequence[Mix]) -> tuple[int, Mix] | None:
        claimed = self._claimed()
        for mix in mixes:
            if mix in claimed:
                continue
            number, trial_id = self._written(mix)
            rivals = [one for one in self._running() if _mix(one) == mix and one.number < number]
            if any(self._lives(one) for one in rivals) or mix in self.finished():
                self._end(trial_id, "FAIL")
                continue
            self._claims[number] = claim = _Claim(trial_id)
            threading.Thread(target=self._beat, args=(claim,), daemon=True).start()
            return number, mix
        return None

    def _running(self) -> list[Any]:
        return [one for one in self._all() if one.state.name == "RUNNING" and _MIX in one.user_attrs]

    def _claimed(self) -> set[Mix]:
        """Mixes that somebody evaluates. Claims of those who are gone are marked as failed."""
        found = set()
        for one in self._running():
            if self._lives(one):
                found.add(_mix(one))
            else:
                self._end(one._trial_id, "FAIL")
        return found

    def _lives(self, one: Any) -> bool:
        """Whether the owner of a claim goes on: its process is there, if it can be asked, and gives signs of life."""
        owner = one.user_attrs.get(_OWNER, {})
        if owner.get("id") == self._owner["id"]:
            return one.number in self._claims
        if owner.get("host") == self._owner["host"] and not _is_running(int(owner.get("pid", 0))):
            return False
        now, sign = time.monotonic(), one.user_attrs.get(_ALIVE)
        before, since = self._seen.get(one._trial_id, (object(), now))
        if before != sign:
            self._seen[one._trial_id] = sign, now
            return True
        return now - since < _SILENCE

    def _written(self, mix: Mix) -> tuple[int, int]:
        optuna = optuna_module()
        attributes = {_MIX: [mix.family, list(mix.picks)], _OWNER: self._owner, _ALIVE: 0}
        with without_optuna_log():
            template = optuna.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=parameters_of(self._space, mix),
                distributions=distributions_of(self._space, mix.family),
                user_attrs=attributes,
            )
            trial_id = self._storage.create_new_trial(self._id, template_trial=template)
            return self._storage.get_trial_number_from_id(trial_id), trial_id

    def _beat(self, claim: _Claim) -> None:
        beats = 0
        while not claim.over.wait(_HEARTBEAT):
            beats += 1
            with suppress(Exception):  # the claim was taken away, or the storage is out of reach for now
                self._storage.set_trial_user_attr(claim.trial_id, _ALIVE, beats)

    def finish(self, trial: TuningTrial) -> None:
        optuna = optuna_module()
        claim = self._claims.pop(trial.number)
        claim.over.set()
        value = trial.work if self._goal is None else score_of(trial, self._goal)
        with without_optuna_log():
            try:
                self._storage.set_trial_user_attr(claim.trial_id, _TRIAL, trial.as_dict())
                self._end(claim.trial_id, "COMPLETE", value)
            except (RuntimeError, ValueError):  # somebody took this process for gone: the trial is kept beside it
                self._study.add_trial(
                    optuna.create_trial(
                        params=parameters_of(self._space, trial.mix),
                        distributions=distributions_of(self._space, trial.mix.family),
                        user_attrs={_TRIAL: trial.as_dict(), _OWNER: self._owner},
                        value=value,
                    )
                )

    def _end(self, trial_id: int, state: str, value: float | None = None) -> None:
        ended = optuna_module().trial.TrialState[state]
        with without_optuna_log():
            try:
                self._storage.set_trial_state_values(trial_id, ended, None if value is None else [value])
            except (RuntimeError, ValueError):
                if value is not None:
                    raise  # a claim of somebody else that is over already needs no end

    def abandon(self, number: int) -> None:
        claim = self._claims.pop(number, None)
        if claim is not None:
            claim.over.set()
            self._end(claim.trial_id, "FAIL")


def _mix(one: Any) -> Mix:
    family, picks = one.user_attrs[_MIX]
    return Mix(int(family), tuple(picks))


def _read(data: Mapping[str, Any]) -> TuningTrial:
    mix = Mix(int(data["mix"]["family"]), tuple(data["mix"]["picks"]))
    return TuningTrial(**{**data, "mix": mix, "left_float": tuple(data["left_float"])})


def _is_running(pid: int) -> bool:
    """Whether there may be a process of that number on this machine."""
    if os.name != "posix":
        return True  # there, asking would be a signal
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # of another user, or without /proc
        return True
    return state not in {"Z", "X"}
