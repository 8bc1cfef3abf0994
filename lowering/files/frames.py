"""Frames: messages between this process and one that is not trusted, as JSON and raw tensors, never as pickles.

A frame: 8 bytes, the length of the JSON; JSON, ``{"values": [...], ...}``; the bytes of each tensor, in order.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}
_MOST_JSON = 1 << 24
_PIECE = 1 << 20


class BrokenFrameError(Exception):
    """What came from the other process is no frame, or ends within one."""


def write_frame(stream: BinaryIO, message: dict[str, Any], values: Sequence[Any] = ()) -> None:
    """Write a message with values: tensors of the usual dtypes, numbers, strings, None. Raises TypeError, OSError."""
    described: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for value in values:
        if isinstance(value, Tensor):
            described.append({"dtype": dtype_name(value.dtype), "shape": list(value.shape)})
            flat = value.detach().cpu().contiguous().reshape(-1)
            blobs.append(flat.view(torch.uint8).numpy().tobytes())
        elif value is None or isinstance(value, bool | int | float | str):
            described.append({"value": value})
        else:
            raise TypeError(f"a {type(value).__name__} cannot be passed on")
    text = json.dumps({**message, "values": described}).encode()
    stream.write(struct.pack("<Q", len(text)) + text)
    stream.writelines(blobs)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], list[Any]]:
    """The next message and its values. Raises `BrokenFrameError`, also at the end of the stream."""
    (length,) = struct.unpack("<Q", _read(stream, 8))
    if length > _MOST_JSON:
        raise BrokenFrameError(f"a message of {length:,} bytes")
    try:
        message = json.loads(_read(stream, length))
        described = message["values"]
        return message, [_value(stream, one) for one in described]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BrokenFrameError(str(error)) from error


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in frames. Raises TypeError for one that frames do not hold."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise TypeError(f"tensors of dtype {name} cannot be passed on")
    return name


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name that `dtype_name` gave. Raises KeyError."""
    return _DTYPES[name]


def _value(stream: BinaryIO, described: dict[str, Any]) -> Any:
    if "dtype" not in described:
        return described["value"]
    dtype, shape = _DTYPES[described["dtype"]], [int(size) for size in described["shape"]]
    if any(size < 0 for size in shape):
        raise BrokenFrameError(f"a tensor of shape {shape}")
    raw = _read(stream, math.prod(shape) * dtype.itemsize)
    return torch.from_numpy(np.frombuffer(raw, np.uint8)).view(dtype).reshape(shape)


def _read(stream: BinaryIO, count: int) -> bytearray:
    """Exactly so many bytes, as they come: nothing is set aside for what is only announced."""
    got = bytearray()
    while len(got) < count:
        piece = stream.read(min(_PIECE, count - len(got)))
        if not piece:
            raise BrokenFrameError("it ended")
        got += piece
    return got
