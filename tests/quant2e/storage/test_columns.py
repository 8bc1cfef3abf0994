"""Columns: records come back as they were, what comes often is written once, and damage is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.errors import FileFormatError
from quant2e.storage.columns import from_columns, to_columns


def test_the_form():
    records = [{"kind": "static", "macs": number} for number in (1, 2, 3)]
    assert to_columns(records) == {"kind": {"values": ["static"], "index": [0, 0, 0]}, "macs": [1, 2, 3]}
    assert to_columns([]) == {}


def test_values_that_are_equal_and_not_the_same():
    records = [{"v": value} for value in (1, 1.0, True, 1, 1.0, True)]
    assert to_columns(records)["v"]["values"] == [1, 1.0, True]
    assert repr(from_columns(to_columns(records), "they", 1000)) == repr(records)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip
RECORDS = st.lists(st.text(max_size=3), min_size=1, max_size=4, unique=True).flatmap(
    lambda keys: st.lists(st.fixed_dictionaries(dict.fromkeys(keys, PLAIN)), max_size=8)
)


@given(RECORDS)
@settings(max_examples=200, deadline=None)
def test_there_and_back(records):
    assert from_columns(json.loads(json.dumps(to_columns(records))), "they", 1000) == records


@pytest.mark.parametrize(
    "columns",
    [
        None, [], "", {"a": None}, {"a": {}}, {"a": {"values": [1]}}, {"a": {"values": [1], "index": [1]}},
        {"a": {"values": [1], "index": [-1]}}, {"a": {"values": [1], "index": [False]}},
        {"a": {"values": [1], "index": [0.0]}}, {"a": {"values": 1, "index": []}}, {"a": {"values": [], "index": 0}},
        {"a": {"values": [1], "index": [0], "more": 0}}, {"a": [1], "b": [1, 2]},
        {"a": [1], "b": {"values": [1], "index": [0, 0]}},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_columns(columns):
    with pytest.raises(FileFormatError, match="they are"):
        from_columns(columns, "they", 1000)
