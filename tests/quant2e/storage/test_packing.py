"""The record inside a file: what is packed comes back as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant2e import FileFormatError
from quant2e.storage.packing import pack_encodings, unpack_encodings

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False).map(lambda x: float(str(np.float32(x))))
lists = (
    st.lists(float32s, max_size=40) | st.lists(st.integers(-5, 5), max_size=40) | st.lists(st.floats(1, 2), max_size=20)
)


@given(scale=lists, zero_point=lists)
def test_packing_loses_nothing(scale, zero_point):
    encodings = {"format": 1, "groups": [{"spec": "s8", "scale": scale, "zero_point": zero_point}]}
    assert unpack_encodings(json.loads(json.dumps(pack_encodings(encodings)))) == encodings


def test_tables_shrink():
    scale = [float(str(x)) for x in np.random.default_rng(0).random(10_000, dtype=np.float32)]
    encodings = {"groups": [{"scale": scale, "zero_point": [0] * 10_000}]}
    assert len(json.dumps(pack_encodings(encodings))) < 54_000
    assert pack_encodings(encodings)["groups"][0]["zero_point"] == {"integer": 0, "count": 10_000}


@pytest.mark.parametrize(
    "damaged",
    [
        {"float32": "!"},
        {"float32": 5},
        {"integer": 0},
        {"integer": 0, "count": -1},
        {"integer": 0, "count": 1 << 60},
        7,
    ],
)
def test_damage_is_an_error(damaged):
    with pytest.raises(FileFormatError, match="damaged"):
        unpack_encodings({"groups": [{"scale": damaged}]})
