"""Plans: the fields that C++ reads, where values lie in the arena, and constants."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowering.native.kernels.plan import (
    ALIGNMENT,
    Activation,
    Arithmetic,
    RegionConstants,
    RegionStep,
    RegionTensor,
    StepKind,
    region_plan,
)
from lowering.native.kernels.shipped import KERNELS

HEADER = 8
FIELDS_OF_VALUES = 9


def struct(name: str, file: str = "region.h") -> list[str]:
    """The int64 fields of a C++ struct, in order."""
    source = (KERNELS / file).read_text()
    body = re.search(rf"struct {name} \{{(.*?)\n(?:\}}|\s*static|\s*$)", source, re.S | re.M)
    assert body is not None
    lines = re.findall(r"^\s*int64_t ([a-z_0-9, ]+);", body[1], re.M)
    return [field.strip() for line in lines for field in line.split(",")]


def enumerators(name: str, file: str) -> list[str]:
    source = re.sub(r"//.*", "", (KERNELS / file).read_text())
    body = re.search(rf"enum {name} : int64_t \{{(.*?)\}}", source, re.S)
    assert body is not None
    return [re.sub(r"\s*=.*", "", entry).strip() for entry in body[1].split(",") if entry.strip()]


def test_steps_have_the_fields_of_the_struct_in_its_order():
    assert [field.name for field in fields(RegionStep)] == [
        name.removesuffix("_bits") for name in map(plain, struct("Step"))
    ]


def plain(name: str) -> str:
    return {"extra_bits": "extra_number"}.get(name, name)


@pytest.mark.parametrize(
    ("python", "name", "file"),
    [(StepKind, "Kind", "region.h"), (Activation, "Activation", "math.h"), (Arithmetic, "Arithmetic", "dot.h")],
)
def test_numbers_stand_for_the_same_in_both_languages(python, name, file):
    def words(text: str) -> str:
        return text.replace("_", "").lower()

    assert [words(member.name) for member in python] == [
        words(entry.removeprefix("k")) for entry in enumerators(name, file)
    ]
    assert [member.value for member in python] == list(range(len(python)))


def test_a_plan_spelled_out():
    values = [RegionTensor(floats=True, h=1, w=2, c=3, argument=0), RegionTensor(floats=False, h=1, w=2, c=3, zero=7)]
    step = RegionStep(kind=StepKind.QUANTIZE, x=0, y=1, inverse=0.5, zero=7)
    plan = region_plan(
        [*values, RegionTensor(floats=True, h=1, w=2, c=3, argument=1)], [step], RegionConstants(), 1, [(2, 3)], 0
    )
    numbers = plan.numbers.tolist()
    assert numbers[:HEADER] == [3, 3, 1, plan.arena, 1, 1, 0, 0]
    assert numbers[HEADER : HEADER + 2 * FIELDS_OF_VALUES] == [-1, 1, 1, 2, 3, 0, 0, 0, 0, 0, 0, 1, 2, 3, 0, 0, 7, 0]
    assert len(numbers) == HEADER + 3 * FIELDS_OF_VALUES + len(fields(RegionStep))
    assert plan.outputs == (3, 1, 2, 3)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=2, max_size=12))
def test_values_that_are_needed_at_the_same_time_do_not_overlap(sizes):
    """Each step reads the value before it and one of the four before that."""
    values = [RegionTensor(floats=False, h=1, w=size, c=7) for size, _ in sizes]
    steps = [
        RegionStep(kind=StepKind.BINARY, x=place - 1, other=max(0, place - 1 - back), y=place)
        for place, (_, back) in enumerate(sizes)
        if place
    ]
    plan = region_plan(values, steps, RegionConstants(), 0, [], 0)
    touched = {value: [] for value in range(len(values))}
    for at, step in enumerate(steps):
        for value in (*step.reads(), *step.writes()):
            touched[value].append(at)
    for one, uses in touched.items():
        begin = values[one].place
        assert begin % ALIGNMENT == 0
        assert begin + values[one].bytes(0) <= plan.arena
        for two, others in touched.items():
            together = one < two and uses[0] <= others[-1] and others[0] <= uses[-1]
            if together:
                end, start = begin + values[one].bytes(0), values[two].place
                assert end <= start or start + values[two].bytes(0) <= begin


def test_constants_lie_aligned_behind_each_other():
    constants = RegionConstants()
    places = [constants.add(torch.arange(n, dtype=torch.int32)) for n in (1, 17, 16)]
    assert places == [0, 64, 192]
    stored = constants.tensor()
    assert stored.dtype is torch.uint8
    assert stored[64 : 64 + 68].view(torch.int32).tolist() == list(range(17))


def test_the_folder_of_kernels_is_shipped():
    names = {path.suffix for path in Path(KERNELS).iterdir()}
    assert {".cpp", ".h"} <= names
