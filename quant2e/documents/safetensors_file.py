"""Tensors of ``.safetensors`` files: a length, a header of JSON, and the bytes of the tensors one behind the other.

The format: https://github.com/huggingface/safetensors#format. Nothing in such a file can be run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quant2e.documents.json_text import read_json
from quant2e.errors import FileFormatError, Quant2eError

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where a tensor lies: a file, as it was when its header was read, and bytes of it.

    - ``offset`` and ``nbytes`` count from the first byte of the file, and lie within ``file_size``.
    - ``nbytes`` is what ``dtype`` and ``shape`` take.
    - ``modified``: when the file was last written, in nanoseconds.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file_size: int
    modified: int

    def __str__(self) -> str:
        return f"'{self.name}' in {self.path}"

    def read(self) -> Tensor:
        """As `read_tensor`."""
        return read_tensor(self)

    def written(self, by: str) -> Quant2eError:
        """The error of what would write to it."""
        return Quant2eError(
            f"{by} writes to {self}, which is read when it is needed and never changed: put a parameter in its place "
            "that holds param.read(), to change it"
        )


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Where each tensor of a ``.safetensors`` file lies, by name, in the order of the header; reads no tensor.

    Raises `FileFormatError` unless every byte behind the header belongs to one tensor, whose dtype and shape say how
    many it has; OSError when the file cannot be read.
    """
    with path.open("rb") as file:
        return _places(file, path)


def read_tensor(place: TensorPlace) -> Tensor:
    """The tensor at ``place``, in memory of its own.

    Raises `FileFormatError` when the file is another one than the header was read from; OSError when it cannot be read.
    """
    with place.path.open("rb", buffering=0) as file:
        if _stamp(file) != (place.file_size, place.modified):
            raise FileFormatError(f"{place.path} changed after its header was read: attach its weights again")
        file.seek(place.offset)
        return _tensor(file, place)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file by name, in the order of the header; they share no memory with the file.

    Raises as `read_header` does.
    """
    with path.open("rb") as file:
        found = {}
        for name, place in _places(file, path).items():
            file.seek(place.offset)
            found[name] = _tensor(file, place)
        return found


def _stamp(file: Any) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _places(file: BinaryIO, path: Path) -> dict[str, TensorPlace]:
    size, modified = _stamp(file)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(_LONGEST_HEADER, size - 8):
        raise FileFormatError(f"{path} is no .safetensors file, or was cut off")
    header = read_json(file.read(length), f"the header of {path}")
    if not isinstance(header, dict):
        raise FileFormatError(f"the header of {path} is no object")
    header.pop("__metadata__", None)
    content, found = size - 8 - length, {}
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(entry, f"'{name}' in {path}", content)
        found[name] = TensorPlace(
            path=path,
            name=name,
            dtype=dtype,
            shape=tuple(shape),
            offset=8 + length + begin,
            nbytes=end - begin,
            file_size=size,
            modified=modified,
        )
    spans = sorted((place.offset, place.offset + place.nbytes) for place in found.values())
    if [begin for begin, _ in spans] + [size] != [8 + length] + [end for _, end in spans]:
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


def _tensor(file: Any, place: TensorPlace) -> Tensor:
    """The tensor whose bytes come next in ``file``."""
    try:
        if not place.nbytes:
            return torch.empty(place.shape, dtype=place.dtype)
        plain = torch.empty(place.nbytes, dtype=torch.uint8)
        rest = plain.numpy().data
        while rest:
            if not (count := file.readinto(rest)):
                raise FileFormatError(f"{place.path} was cut off while it was read")
            rest = rest[count:]
        values = plain != 0 if place.dtype is torch.bool else plain.view(place.dtype)
        return values.reshape(place.shape)
    except RuntimeError as error:  # no numbers at all, in a shape that torch has no index for
        raise FileFormatError(f"{place} is damaged: {error}") from error
