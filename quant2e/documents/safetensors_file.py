"""Tensors of ``.safetensors`` files: a length, a header of JSON, and the bytes of the tensors one behind the other.

The format: https://github.com/huggingface/safetensors#format. Nothing in such a file can be run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant2e.documents.json_text import read_json
from quant2e.errors import FileFormatError

_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_LONGEST_HEADER = 100_000_000
_MOST_DIMENSIONS = 16


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file by name, in the order of the header; they share no memory with the file.

    Raises `FileFormatError` unless every byte behind the header belongs to one tensor, whose dtype and shape say how
    many it has; OSError when the file cannot be read.
    """
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > min(_LONGEST_HEADER, len(raw) - 8):
        raise FileFormatError(f"{path} is no .safetensors file, or was cut off")
    header = read_json(raw[8 : 8 + length], f"the header of {path}")
    if not isinstance(header, dict):
        raise FileFormatError(f"the header of {path} is no object")
    header.pop("__metadata__", None)
    content, places, found = memoryview(bytearray(raw[8 + length :])), [], {}
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(entry, f"'{name}' in {path}", len(content))
        places.append((begin, end))
        found[name] = _tensor(content[begin:end], dtype, shape, f"'{name}' in {path}")
    places.sort()
    if [begin for begin, _ in places] + [len(content)] != [0] + [end for _, end in places]:
        raise FileFormatError(f"{path} is damaged: its tensors overlap, or leave bytes between them")
    return found


def _entry(entry: Any, what: str, size: int) -> tuple[torch.dtype, list[int], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(f"{what} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = _DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise FileFormatError(f"{what} has the dtype {str(entry['dtype'])[:20]!r}: one of {', '.join(_DTYPES)}")
    if not _counts(shape) or len(shape) > _MOST_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise FileFormatError(f"{what} has a shape or offsets that are none")
    begin, end = offsets
    if not begin <= end <= size or end - begin != math.prod(shape) * dtype.itemsize:
        raise FileFormatError(f"{what} is damaged: {entry['dtype']}{shape} does not have {end - begin:,} bytes")
    return dtype, shape, begin, end


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _tensor(raw: memoryview, dtype: torch.dtype, shape: list[int], what: str) -> Tensor:
    try:
        if not len(raw):
            return torch.empty(shape, dtype=dtype)
        plain = torch.frombuffer(raw, dtype=torch.uint8).clone()
        values = plain != 0 if dtype is torch.bool else plain.view(dtype)
        return values.reshape(shape)
    except RuntimeError as error:  # no numbers at all, in a shape that torch has no index for
        raise FileFormatError(f"{what} is damaged: {error}") from error
