"""Frames: what is written is read, whatever the dtype; what is no frame is an error of its own, and takes no memory."""

import contextlib
import io
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowering.files.frames import BrokenFrameError, read_frame, write_frame


def written(message, values=()):
    stream = io.BytesIO()
    write_frame(stream, message, values)
    return stream.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6, dtype=torch.int8).reshape(2, 3).T,
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
        torch.randn(2, 2, dtype=torch.float64, requires_grad=True),
        3,
        2.5,
        "text",
        None,
        True,
    ],
    ids=["transposed", "bfloat16", "empty", "bool", "with gradient", "int", "float", "text", "None", "True"],
)
def test_values_are_read_as_they_were_written(value):
    message, (got, last) = read_frame(io.BytesIO(written({"name": "x"}, [value, 7])))
    assert message["name"] == "x"
    assert last == 7
    if isinstance(value, torch.Tensor):
        assert got.dtype is value.dtype
        assert torch.equal(got, value.detach())
    else:
        assert got == value
        assert type(got) is type(value)


@pytest.mark.parametrize(
    "value", [torch.zeros(2, dtype=torch.complex64), [1], object()], ids=["complex", "list", "object"]
)
def test_what_frames_do_not_hold(value):
    stream = io.BytesIO()
    with pytest.raises(TypeError, match="cannot be passed on"):
        write_frame(stream, {}, [1, value])
    assert stream.getvalue() == b""


def framed(value):
    text = json.dumps({"values": value}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 100,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 1 << 20) + b"[" * (1 << 20),
        framed([{"dtype": "float32", "shape": [1 << 40]}]),
        framed([{"dtype": "float32", "shape": [-1]}]),
        framed([{"dtype": "object", "shape": [1]}]),
        framed([{"shape": [1]}]),
        framed([3]),
        framed(3),
    ],
)
def test_what_is_no_frame(data):
    with pytest.raises(BrokenFrameError):
        read_frame(io.BytesIO(data))


GOOD = written({"inputs": []}, [torch.arange(4), 1, None])


@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=4))
def test_damaged_frames_are_told(at, put):
    with contextlib.suppress(BrokenFrameError):
        read_frame(io.BytesIO(GOOD[:at] + put + GOOD[at + len(put) :]))
