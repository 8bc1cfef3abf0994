"""Schedules: what is frozen and switched at which step or epoch of a training, as one callable."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from quant2e.errors import Quant2eError
from quant2e.graph.captured.modes import FROZEN, freeze_batch_norm
from quant2e.graph.effects import BATCH_NORMS
from quant2e.observers.derived import is_fake_quantizer
from quant2e.observers.fake_quant import disable_fake_quant, disable_observer, enable_fake_quant, enable_observer
from quant2e.observers.learned_fake_quant import disable_range_learning, enable_range_learning

ScheduledAction = str | Callable[..., Any]
"""A function of `ACTIONS`, or its name."""

_SWITCHES: Sequence[Callable[[nn.Module], None]] = (
    enable_observer,
    disable_observer,
    enable_fake_quant,
    disable_fake_quant,
    enable_range_learning,
    disable_range_learning,
)
ACTIONS: Mapping[str, Callable[..., Any]] = {
    **{switch.__name__: switch for switch in _SWITCHES},
    freeze_batch_norm.__name__: freeze_batch_norm,
}
"""What a schedule may do, by name."""


class Schedule:
    """Switches a model that is prepared for training at given steps, or epochs: the unit is the caller's.

        schedule = Schedule(prepared, {0: "disable_fake_quant", 50: "enable_fake_quant",
                                       200: ("disable_observer", "freeze_batch_norm")})
        for step in range(300):
            schedule(step)
            ...

    ``actions``: step → an action, or several in order. An action is one of ``enable_observer``, ``disable_observer``,
    ``enable_fake_quant``, ``disable_fake_quant``, ``enable_range_learning``, ``disable_range_learning`` and
    ``freeze_batch_norm``, as the name or as the function of `quant2e`.

    Calling it with a step does what is due at this step and was due since the last call, and returns the names of it.
    A first call with a later step catches up, as when a training is resumed. The model may be wrapped, in
    DistributedDataParallel say.

    Raises `Quant2eError` for an action that is none, with the nearest; for a negative step, and one that is before
    the last; and when an action that is due changes nothing: there is no norm to freeze, all observers are off already.
    """

    def __init__(self, model: nn.Module, actions: Mapping[int, ScheduledAction | Sequence[ScheduledAction]]) -> None:
        self._model = _inner(model)
        self._due = {step: [_name(action) for action in _several(actions[step])] for step in sorted(actions)}
        if not all(self._due.values()) or not self._due:
            raise Quant2eError("a schedule without actions changes nothing: leave it out")
        for step, names in self._due.items():
            if type(step) is not int or step < 0:
                raise Quant2eError(f"step {step!r}: steps and epochs are whole numbers from 0 on")
            for name in names:
                _check_possible(self._model, name, step)
        self._last: int | None = None

    @property
    def pending(self) -> dict[int, tuple[str, ...]]:
        """What is still to come, by step: empty at the end of a training that reached every step."""
        last = -1 if self._last is None else self._last
        return {step: tuple(names) for step, names in self._due.items() if step > last}

    def __call__(self, step: int) -> tuple[str, ...]:
        """Do what is due, and say what that was. Call it at the beginning of each step, or of each epoch."""
        if not 0 <= step < math.inf:
            raise Quant2eError(f"step {step}: steps and epochs are whole numbers from 0 on")
        if self._last is not None and step < self._last:
            raise Quant2eError(f"step {step} comes after step {self._last}: a schedule goes forward; make a new one")
        resumed, last = self._last is None and step > 0, -1 if self._last is None else self._last
        done: list[str] = []
        for due, names in self._due.items():
            if not last < due <= step:
                continue
            for name in names:
                before = _state(self._model)
                _do(self._model, name)
                if _state(self._model) == before and not (resumed and due < step):
                    raise Quant2eError(f"'{name}' at step {due} changes nothing: the model is in that state already")
                done.append(name)
        self._last = step
        return tuple(done)

    def __repr__(self) -> str:
        return f"Schedule({ {step: tuple(names) for step, names in self._due.items()} })"


def _several(actions: ScheduledAction | Sequence[ScheduledAction]) -> Sequence[ScheduledAction]:
    return [actions] if isinstance(actions, str) or callable(actions) else actions


def _name(action: ScheduledAction) -> str:
    name = action if isinstance(action, str) else getattr(action, "__name__", repr(action))
    if name not in ACTIONS or (callable(action) and action is not ACTIONS[name]):
        near = difflib.get_close_matches(name, ACTIONS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise Quant2eError(f"'{name}' is no action; {hint}actions are {', '.join(ACTIONS)}")
    return name


def _inner(model: nn.Module) -> nn.Module:
    """The model inside of wrappers such as DistributedDataParallel."""
    wrapped = getattr(model, "module", None)
    return _inner(wrapped) if isinstance(wrapped, nn.Module) and not isinstance(model, GraphModule) else model


def _check_possible(model: nn.Module, name: str, step: int) -> None:
    """Raise where a model has nothing that an action could ever change."""
    if name == freeze_batch_norm.__name__:
        if next(_norms(model), None) is None:
            raise Quant2eError(f"'{name}' at step {step} changes nothing: the model has no batch norm")
        return
    switch = "learning_enabled" if name.endswith("range_learning") else "fake_quant_enabled"
    if not any(hasattr(module, switch) for module in _fake_quantizers(model)):
        kind = "learned range" if switch == "learning_enabled" else "fake-quantizer"
        raise Quant2eError(
            f"'{name}' at step {step} changes nothing: the model has no {kind}; prepare it with a configuration for "
            "training (is_qat=True)"
        )


def _fake_quantizers(model: nn.Module) -> list[Any]:
    """Those of other libraries too, which have the same switches."""
    return [module for module in model.modules() if is_fake_quantizer(module)]


def _norms(model: nn.Module) -> Any:
    graphs = (module.graph for module in model.modules() if isinstance(module, GraphModule))
    return (node for graph in graphs for node in graph.nodes if node.target in BATCH_NORMS)


def _do(model: nn.Module, name: str) -> None:
    if name == freeze_batch_norm.__name__:
        assert isinstance(model, GraphModule), "only graphs have the norms that were found"
        freeze_batch_norm(model)
    else:
        for module in _fake_quantizers(model):
            if callable(switch := getattr(module, name, None)):
                switch()


def _state(model: nn.Module) -> list[Any]:
    """All that actions change."""
    switches: list[Tensor] = [
        getattr(module, name).flatten()
        for module in _fake_quantizers(model)
        for name in ("observer_enabled", "fake_quant_enabled", "learning_enabled")
        if hasattr(module, name)
    ]
    held = torch.cat(switches).tolist() if switches else []
    return [held, [bool(node.meta.get(FROZEN)) for node in _norms(model)]]
