"""Example inputs in files: described, kept when asked for, and refused where damaged."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.errors import FileFormatError
from quant2e.storage.example_inputs import describe_inputs, restore_inputs

LEAVES = [
    torch.linspace(-2, 6, 10).view(2, 5),
    torch.tensor([float("nan"), float("inf"), -1.5]),
    torch.full((3,), float("nan")),
    torch.tensor(3.0, dtype=torch.float64),
    torch.arange(6, dtype=torch.bfloat16)[::2],
    torch.tensor([5, 9, 5]),
    torch.tensor([-(2**63), 2**63 - 1]),
    torch.tensor([[250]], dtype=torch.uint8),
    torch.tensor([7, 60000], dtype=torch.uint16),
    torch.tensor([True, True]),
    torch.tensor([True, False]),
    torch.zeros(0, 4),
    torch.tensor([1j]),
    3, True, None, "mean", -0.0, float("inf"),
]  # fmt: skip


def through_json(leaves, *, data=False):
    return json.loads(json.dumps(describe_inputs(leaves, data=data), allow_nan=False))


def test_descriptions():
    assert describe_inputs([LEAVES[0], LEAVES[5], None, 0.5], data=False) == [
        {"dtype": "float32", "shape": [2, 5], "bounds": [-2.0, 6.0]},
        {"dtype": "int64", "shape": [3], "bounds": [5, 9]},
        {"value": None},
        {"float": "0.5"},
    ]


def test_stand_ins_look_like_the_inputs():
    leaves, stand_ins = restore_inputs(through_json(LEAVES))
    assert stand_ins
    for leaf, original in zip(leaves, LEAVES, strict=True):
        if not isinstance(original, torch.Tensor):
            assert repr(leaf) == repr(original)
            continue
        assert (leaf.dtype, leaf.shape) == (original.dtype, original.shape)
        finite = original[original.isfinite()]
        if finite.numel() and not original.is_complex():
            assert leaf.double().min() >= finite.double().min()
            assert leaf.double().max() <= finite.double().max()
    again, _ = restore_inputs(through_json(LEAVES))
    assert all(torch.equal(a, b) for a, b in zip(leaves, again, strict=True) if isinstance(a, torch.Tensor))


def test_stand_ins_are_spread_over_the_bounds_and_leave_the_random_state_alone():
    state = torch.random.get_rng_state()
    entries = through_json([torch.tensor([0.0, 1.0]).repeat(500), torch.tensor([3, 9]).repeat(500)])
    (floats, integers), _ = restore_inputs(entries)
    assert 0.4 < floats.mean() < 0.6
    assert 0.1 < floats.std() < 0.25
    assert set(integers.tolist()) == set(range(3, 10))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("tensor", [
    torch.tensor([[-9.0, 0.5, 31.0]]), torch.arange(20.0).view(4, 5) / 7, torch.tensor([3, 90]), torch.tensor([2, 2]),
    torch.tensor([True, False]), torch.tensor([-2.0, 0.25, 7.0]).to(torch.float8_e4m3fn), torch.tensor([5.0]),
])  # fmt: skip
def test_stand_ins_are_described_as_what_they_stand_for(tensor):
    """Else the bounds of a file that is loaded and saved come nearer to each other each time."""
    described = through_json([tensor])
    again = through_json(restore_inputs(described)[0])
    assert again == described


def test_the_data_when_asked_for():
    leaves, stand_ins = restore_inputs(through_json(LEAVES, data=True))
    assert not stand_ins
    for leaf, original in zip(leaves, LEAVES, strict=True):
        if isinstance(original, torch.Tensor):
            assert leaf.dtype == original.dtype
            assert leaf.view(-1).view(torch.uint8).tolist() == original.contiguous().view(-1).view(torch.uint8).tolist()


def test_large_stand_ins_take_little_memory():
    (first, second), _ = restore_inputs(
        [{"dtype": "float32", "shape": [1 << 40]}, {"dtype": "int8", "shape": [1 << 20, 1 << 20]}]
    )
    assert first.untyped_storage().nbytes() <= 4
    assert second.untyped_storage().nbytes() <= 1 << 24
    assert first.shape == (1 << 40,)


GOOD = {"dtype": "float32", "shape": [2]}


@pytest.mark.parametrize(
    "entry",
    [
        None, [], {}, {"value": []}, {"value": 0.5}, {"float": "x"}, {"float": 1.0}, {"value": 1, "float": "1"},
        {"dtype": "float32"}, {"shape": [2]}, {**GOOD, "more": 1}, {**GOOD, "dtype": "qint8"}, {**GOOD, "dtype": None},
        {**GOOD, "dtype": []}, {**GOOD, "shape": 2}, {**GOOD, "shape": [-1]}, {**GOOD, "shape": [2.0]},
        {**GOOD, "shape": [True]}, {**GOOD, "shape": [1 << 49]}, {**GOOD, "shape": [1] * 65},
        {**GOOD, "shape": [1 << 25, 1 << 25]}, {**GOOD, "bounds": None, "data": 3}, {**GOOD, "bounds": [1.0]},
        {**GOOD, "bounds": [2.0, 1.0]}, {**GOOD, "bounds": [1, 2]}, {**GOOD, "bounds": [float("nan"), 1.0]},
        {**GOOD, "bounds": [0.0, float("inf")]}, {**GOOD, "dtype": "int8", "bounds": [0, 128]},
        {**GOOD, "dtype": "bool", "bounds": [0, 2]}, {**GOOD, "dtype": "int8", "bounds": [False, True]},
        {**GOOD, "dtype": "complex64", "bounds": [0, 1]}, {**GOOD, "data": "AAA="}, {**GOOD, "data": "*"},
        {**GOOD, "data": None}, {**GOOD, "data": "AAAAAAAAAAAAAAAA"},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_entries(entry):
    with pytest.raises(FileFormatError):
        restore_inputs([entry])


@pytest.mark.parametrize("entries", [None, {}, "text", 3])
def test_no_list(entries):
    with pytest.raises(FileFormatError, match="not described by a list"):
        restore_inputs(entries)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["float32", "int8", "bool", "complex64", "", "AAAA"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "bounds", "data", "value", "float"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.lists(VALUES, max_size=3))
@settings(max_examples=300, deadline=None)
def test_anything_else_is_refused_or_restored(entries):
    try:
        leaves, _ = restore_inputs(entries)
    except FileFormatError:
        return
    assert len(leaves) == len(entries)
