"""Archive writer: named records as a zip that torch reads, stored as they are.

The same records give the same bytes: no times, no attributes, no compression, and nothing of the name of the file. As
in the archives that torch writes, all records lie in one folder, and the data of each begins at a multiple of 64 bytes,
behind padding in an extra field of the header. Sizes of 4 GiB and more are written as zip64 says.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO

from quant2e.storage.writer.values import Bytes

FOLDER = "archive"
"""What torch calls the folder around all records in an archive that it writes to a stream."""

_HEADER, _ENTRY = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_PLAIN, _WIDE = 20, 45
"""Versions of the zip format: 4.5 has sizes of 64 bits."""
_FIRST_DAY = (0, 0x21)
"""Time and date of every record: midnight of 1 January 1980, the zero of the format."""
_ALIGNMENT = 64


def write_records(file: BinaryIO, records: Iterable[tuple[str, Bytes]]) -> None:
    """Write ``records``, each name once, to ``file`` in this order."""
    directory, names, position = bytearray(), set(), 0
    for name, data in records:
        assert name not in names, name
        names.add(name)
        position += _write_record(file, directory, position, name, data)
    file.write(directory)
    file.write(_end(len(names), len(directory), position))


def _write_record(file: BinaryIO, directory: bytearray, offset: int, name: str, data: Bytes) -> int:
    """Write one record at ``offset`` and add its entry to the directory; returns how many bytes it takes."""
    path, size, crc = f"{FOLDER}/{name}".encode("ascii"), len(data), zlib.crc32(data)
    needed = _WIDE if max(size, offset) >= _FULL32 else _PLAIN
    sizes = _wide(size, size)
    padding = -(offset + _HEADER.size + len(path) + len(sizes) + 4) % _ALIGNMENT
    extra = sizes + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    shared = (needed, 0, 0, *_FIRST_DAY, crc, min(size, _FULL32), min(size, _FULL32), len(path))
    file.write(_HEADER.pack(b"PK\3\4", *shared, len(extra)) + path + extra)
    file.write(data)
    far = _wide(*(value for value in (size, size, offset) if value >= _FULL32))
    directory += _ENTRY.pack(b"PK\1\2", needed, *shared, len(far), 0, 0, 0, 0, min(offset, _FULL32)) + path + far
    return _HEADER.size + len(path) + len(extra) + size


def _wide(*values: int) -> bytes:
    """The extra field with sizes of 64 bits; empty when none of the values needs them."""
    if not values or max(values) < _FULL32:
        return b""
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)


def _end(count: int, size: int, start: int) -> bytes:
    """The end of an archive whose directory has ``count`` entries and ``size`` bytes, from ``start`` on."""
    few, small, near = min(count, _FULL16), min(size, _FULL32), min(start, _FULL32)
    end = _END.pack(b"PK\5\6", 0, 0, few, few, small, near, 0)
    if (few, small, near) == (count, size, start) and few != _FULL16 and _FULL32 not in (small, near):
        return end
    wide = _END64.pack(b"PK\6\6", _END64.size - 12, _WIDE, _WIDE, 0, 0, count, count, size, start)
    return wide + _LOCATOR64.pack(b"PK\6\7", 0, start + size, 1) + end
