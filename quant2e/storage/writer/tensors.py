"""Tensor records: the bytes of tensors, and where in which record each of them begins.

    a, b = x[:4], x[2:6]    =>    one record of 6 elements; a at 0, b at 2

Tensors that share memory share a record, so that a write to one is seen by the other after loading, too. Memory of a
storage that no tensor covers is not written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from quant2e.errors import Quant2eError
from quant2e.storage.writer.values import Bytes, Json, Values
from quant2e.stored_tensor import StoredTensor, in_memory


@dataclass(frozen=True, slots=True)
class _Span:
    """The elements of a storage from ``start`` to ``end`` that one tensor, or several that overlap, lie in."""

    start: int
    end: int
    names: tuple[str, ...]


def tensor_records(
    tensors: Mapping[str, Tensor], prefix: str, values: Values
) -> tuple[dict[str, Callable[[], Bytes]], Json]:
    """Records by name (``prefix`` and a number), and torch's table of which tensor lies where in them.

    The bytes of a record are made when they are asked for: a `StoredTensor` is read then. Raises `Quant2eError` for
    other tensors that are no plain ones in memory.
    """
    records: dict[str, Callable[[], Bytes]] = {}
    config: Json = {}
    for span in _spans(tensors):
        name = f"{prefix}{len(records)}"
        first = tensors[span.names[0]]
        records[name] = partial(_bytes, first, span)
        for path in span.names:
            tensor = tensors[path]
            meta = {**values.tensor(tensor), "storage_offset": {"as_int": tensor.storage_offset() - span.start}}
            config[path] = {
                "path_name": name,
                "is_param": isinstance(tensor, nn.Parameter),
                "use_pickle": False,
                "tensor_meta": meta,
            }
    return records, {"config": config}


def _spans(tensors: Mapping[str, Tensor]) -> Iterator[_Span]:
    """Tensors that share memory, together; in the order in which they are given."""
    storages: dict[tuple[object, ...], list[_Span]] = {}
    for path, tensor in tensors.items():
        _check(path, tensor)
        start = int(tensor.storage_offset())
        last = sum(int((size - 1) * stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        end = start + last + 1 if tensor.numel() else start
        key = (tensor.device, tensor.dtype, _memory(tensor) if end > start else path)
        storages.setdefault(key, []).append(_Span(start, end, (path,)))
    for spans in storages.values():
        yield from _merged(spans)


def _memory(tensor: Tensor) -> int:
    return id(tensor) if isinstance(tensor, StoredTensor) else tensor.untyped_storage().data_ptr()


def _merged(spans: Iterable[_Span]) -> list[_Span]:
    merged: list[_Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if merged and span.start < merged[-1].end:
            last = merged[-1]
            merged[-1] = _Span(last.start, max(last.end, span.end), last.names + span.names)
        else:
            merged.append(span)
    return merged


def _check(path: str, tensor: Tensor) -> None:
    if isinstance(tensor, StoredTensor):
        return
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and type(tensor.data) is Tensor
    if not plain or tensor.is_meta or tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        kind = type(tensor.data).__name__ if not plain else "lazy or sparse tensor"
        raise Quant2eError(f"'{path}' is a {kind}: a file holds plain tensors only, so replace it by one")


def _bytes(tensor: Tensor, span: _Span) -> memoryview:
    """The bytes of a span of the storage of ``tensor``, without a copy where they are in main memory."""
    if span.end == span.start:
        return memoryview(b"")
    values: Tensor = in_memory(tensor)
    flat = values.detach().as_strided((span.end - span.start,), (1,), span.start)
    return flat.cpu().view(torch.uint8).numpy().data
