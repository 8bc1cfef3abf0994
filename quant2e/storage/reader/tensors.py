"""Tensors of a file: the bytes of a record, and how a tensor lies in them.

Each record becomes memory of its own, so tensors that shared memory when they were saved share it again, and nothing
refers to the bytes of the file. A tensor lies within its record, and is not larger than the file: a stride of zero
makes a large tensor of a small one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quant2e.documents.json_text import read_json
from quant2e.errors import FileFormatError
from quant2e.storage.reader import schema_numbers
from quant2e.storage.reader.archive import Archive
from quant2e.storage.reader.schema import PAYLOADS, check_schema

DTYPES: Mapping[int, torch.dtype] = {number: dtype for dtype, number in schema_numbers.DTYPES.items()}
"""Dtypes by torch's numbers for them."""

_SMALL = 1 << 20
"""A tensor of so many bytes may come out of any file."""

_MOST_DIMENSIONS = 64


def read_tensors(
    archive: Archive, folder: str, model: str, *, copied: bool = True
) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors of one folder of an archive (``weights``, ``constants``) by their paths, and the records they lie in.

    ``copied=False``: they lie in the bytes of the archive themselves, and are only to be looked at.
    """
    name = f"data/{folder}/{model}_{folder}_config.json"
    if name not in archive.records:
        raise FileFormatError(f"the record '{name}' is missing")
    config = read_json(archive.records[name], f"'{name}'")
    check_schema(config, PAYLOADS, f"'{name}'")
    prefix = {"weights": "weight_", "constants": "tensor_"}[folder]
    memory: dict[str, Tensor] = {}
    tensors = {}
    for path, payload in config["config"].items():
        record = payload["path_name"]
        _check_payload(record, prefix, payload)
        place = f"data/{folder}/{record}"
        if place not in archive.records:
            raise FileFormatError(f"the record '{place}' is missing")
        meta = payload["tensor_meta"]
        if place not in memory:
            memory[place] = (own_memory if copied else bytes_as_tensor)(archive.records[place], DTYPES[meta["dtype"]])
        tensors[path] = _tensor(memory[place], meta, payload["is_param"], f"'{path}'", archive.size)
    return tensors, {name, *memory}


def _check_payload(record: str, prefix: str, payload: Mapping[str, Any]) -> None:
    """What torch does with a record follows from its name: some names mean a pickle whatever the flag says."""
    if payload["use_pickle"] is not False:
        raise FileFormatError("it holds pickled objects, which can run code when loaded; save the tensors plainly")
    number = record.removeprefix(prefix)
    if not record.startswith(prefix) or not (number.isascii() and number.isdigit()) or payload["tensor_meta"] is None:
        raise FileFormatError(f"it holds the payload {record[:80]!r}, which is not a plain tensor")


def _tensor(memory: Tensor, meta: Mapping[str, Any], is_parameter: bool, what: str, size: int) -> Tensor:
    if memory.dtype != DTYPES[meta["dtype"]]:
        raise FileFormatError(f"{what} lies in a record of another dtype, {memory.dtype}")
    sizes, strides, offset = (_plain(value, what) for value in (meta["sizes"], meta["strides"], meta["storage_offset"]))
    tensor = strided(memory, sizes, strides, offset, what, size)
    device = meta["device"]
    if device["type"] != "cpu":
        tensor = _moved(tensor, device, what)
    grad = meta["requires_grad"]
    if grad and not (is_parameter and (tensor.is_floating_point() or tensor.is_complex())):
        raise FileFormatError(f"{what} is to be trained, and is no parameter of floats")
    return nn.Parameter(tensor, requires_grad=grad) if is_parameter else tensor


def _plain(value: Any, what: str) -> Any:
    """The numbers of sizes or of an offset, which are no formulas in a tensor that exists."""
    if isinstance(value, list):
        return [_plain(item, what) for item in value]
    if "as_int" not in value:
        raise FileFormatError(f"{what} has a size that is not a number")
    return value["as_int"]


def device_of(device: Mapping[str, Any]) -> torch.device:
    """A device as the file names it."""
    index = device.get("index")
    return torch.device(device["type"]) if index is None else torch.device(device["type"], index)


def _moved(tensor: Tensor, device: Mapping[str, Any], what: str) -> Tensor:
    try:
        return tensor.to(device_of(device))
    except (RuntimeError, AssertionError, ImportError) as error:
        raise FileFormatError(f"{what} lies on {device['type']}, which this machine lacks: {error}") from error


def own_memory(data: memoryview, dtype: torch.dtype) -> Tensor:
    """The bytes of a record as a one-dimensional tensor of its own memory. Raises `FileFormatError`."""
    raw = torch.empty(len(data), dtype=torch.uint8)
    if data:
        raw.numpy()[:] = np.frombuffer(data, dtype=np.uint8)
    return _viewed(raw, dtype)


def bytes_as_tensor(data: memoryview, dtype: torch.dtype) -> Tensor:
    """The bytes of a record themselves as a one-dimensional tensor, never to be written to. Raises `FileFormatError`.

    A record whose bytes do not begin where a number of ``dtype`` may is copied.
    """
    plain = np.frombuffer(data, dtype=np.uint8)
    if not data or plain.ctypes.data % dtype.itemsize:
        return own_memory(data, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of arrays that may not be written to
        return _viewed(torch.from_numpy(plain), dtype)


def _viewed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    data = len(raw)
    if data % dtype.itemsize:
        raise FileFormatError(f"a record of {data} bytes is no tensor of {dtype}")
    if dtype == torch.bool and data and int(raw.max()) > 1:
        raise FileFormatError("a tensor of bool holds something else than true and false")
    return raw.view(dtype)


def strided(
    memory: Tensor, sizes: Sequence[int], strides: Sequence[int], offset: int, what: str, file_size: int
) -> Tensor:
    """The tensor of these sizes that lies at ``offset`` in ``memory``. Raises `FileFormatError` unless it does."""
    if len(sizes) != len(strides) or len(sizes) > _MOST_DIMENSIONS or min((0, offset, *sizes, *strides)) < 0:
        raise FileFormatError(f"{what} has sizes and strides that no tensor has")
    count = math.prod(sizes)
    last = offset + sum((number - 1) * stride for number, stride in zip(sizes, strides, strict=True))
    if count and last >= memory.numel():
        raise FileFormatError(f"{what} of {list(sizes)} is larger than its record of {memory.numel()} values")
    if count * memory.dtype.itemsize > max(file_size, _SMALL) or max((0, offset, *strides)) >= 1 << 62:
        raise FileFormatError(f"{what} of {list(sizes)} is larger than the file")
    if math.prod(max(number, 1) for number in sizes) >= 1 << 62:  # torch multiplies the sizes of empty tensors, too
        raise FileFormatError(f"{what} of {list(sizes)} is larger than the file")
    return torch.as_strided(memory, tuple(sizes), tuple(strides), offset if count else 0)
