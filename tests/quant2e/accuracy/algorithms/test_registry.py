"""The registry: what is asked for by name, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from torch import nn

from quant2e.accuracy.algorithms import registry
from quant2e.accuracy.algorithms.algorithm import Algorithm, Stage
from quant2e.accuracy.algorithms.ladder import attempts_of
from quant2e.accuracy.algorithms.registry import ALGORITHMS, make_algorithm, read_algorithms
from quant2e.errors import Quant2eError
from quant2e.pipeline import quantize
from tests.quant2e.annotators import products


@dataclass(frozen=True, slots=True)
class Made(Algorithm):
    """One setting of each kind."""

    name: ClassVar[str] = "made"
    stage: ClassVar[Stage] = Stage.CAPTURED
    exact: ClassVar[bool] = True
    alpha: float | None = None
    steps: int = 1
    fast: bool = False
    kind: Literal["mean", "max"] = "mean"
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 1.0)
    bits: Mapping[str, int] | None = None
    some: Sequence[float] = ()

    def apply(self, model, context):
        return []


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "ALGORITHMS", {**ALGORITHMS, "made": Made})


FITS = [
    ("made", Made()),
    ({"made": {}}, Made()),
    ({"made": None}, Made()),
    (Made(steps=3), Made(steps=3)),
    ({"made": {"alpha": 1, "steps": 2, "fast": True, "kind": "max"}}, Made(alpha=1, steps=2, fast=True, kind="max")),
    ({"made": {"names": ["a", "b"], "pair": [2, 1], "bits": {"a": 4}, "some": [1]}},
     Made(names=("a", "b"), pair=(2, 1), bits={"a": 4}, some=(1,))),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "made"), FITS)
def test_fits(asked, made):
    assert read_algorithms([asked]) == (made,)


REFUSED = [
    ("mad", "there is no algorithm 'mad': did you mean 'made'"),
    ("auto", '"auto" stands alone'),
    ({"made": {"alhpa": 1}}, "'made' has no setting 'alhpa': did you mean 'alpha'"),
    ({"made": {"alpha": "1"}}, "made: alpha='1' has another type than the setting, float | None"),
    ({"made": {"alpha": True}}, "alpha=True"),
    ({"made": {"steps": 1.5}}, "made: steps=1.5 has another type than the setting, int"),
    ({"made": {"fast": 1}}, "fast=1"),
    ({"made": {"kind": "min"}}, "kind='min'"),
    ({"made": {"names": "ab"}}, "names='ab'"),
    ({"made": {"names": ["a", 1]}}, "names="),
    ({"made": {"pair": [1]}}, "pair="),
    ({"made": {"bits": {"a": "4"}}}, "bits="),
    ({"made": 3}, "is no algorithm"),
    ({"made": {}, "other": {}}, "is no algorithm"),
    (7, "is no algorithm"),
    (Made, "Made is a class; give an algorithm, Made"),
]


@pytest.mark.parametrize(("asked", "said"), REFUSED)
def test_refused(asked, said):
    with pytest.raises(Quant2eError) as error:
        read_algorithms([asked])
    assert said in str(error.value)


@pytest.mark.parametrize("asked", ["made", {"made": {}}, Made(), None, 3])
def test_one_that_is_not_in_a_list(asked):
    with pytest.raises(Quant2eError, match="a list"):
        attempts_of(asked)


def test_nothing_is_done_before_settings_are_checked():
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError

    with pytest.raises(Quant2eError, match="did you mean 'steps'"):
        quantize(Never(), torch.randn(2), products(), algorithms=[{"made": {"step": 1}}])


def test_every_algorithm_can_be_made_and_says_its_name():
    for name, kind in ALGORITHMS.items():
        assert make_algorithm(name, {}) == kind()
        assert kind.name == name
    assert {attempt.algorithm.name for attempt in attempts_of("auto")} <= set(ALGORITHMS)
