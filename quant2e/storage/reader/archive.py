"""Zip archive of a ``.pt2`` file: bytes that are read once become named records, and every byte is accounted for.

Two readers of one zip can see two different files: one goes by the directory, another by the headers in front of the
data; one skips what another takes for a folder. So only one form is accepted, the one that torch and `quant2e.save`
write: stored records without attributes, comments, encryption or other disks, which tile the file from its first byte
to the directory, and whose headers say what the directory says. Whatever else a zip may be, it is refused.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

from quant2e.errors import FileFormatError

_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_ENTRY, _HEADER = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_DESCRIPTOR, _DESCRIPTOR64 = struct.Struct("<4s3I"), struct.Struct("<4sI2Q")

_PLAIN, _UTF8, _DESCRIBED = 0, 0x0800, 0x0808
"""Flags: none; a name in UTF-8; and sizes behind the data as well, which torch writes for records that have data."""

_MADE_BY, _ENDS64 = (0, 20, 45), ((798, 45), (45, 45))
"""Versions of the format that torch and `quant2e.save` name in entries, and in an end of 64 bits."""

_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
"""What a field holds whose value is in a zip64 field."""

_ZIP64, _PADDING = 1, int.from_bytes(b"FB", "little")
"""Extra fields that may stand in front of data: 64-bit sizes, and padding with which torch aligns the data."""

_NAME = re.compile(r"(?!.*(^|/)\.\.?(/|$))[\w.-]+(/[\w.-]+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Archive:
    """``records``: the bytes of each record, by its name without the folder around all of them. ``size``: in bytes."""

    records: Mapping[str, memoryview]
    size: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of the directory."""

    name: str
    needed: int
    flags: int
    moment: tuple[int, int]
    crc: int
    size: int
    offset: int


def open_archive(path: Path, *, mapped: bool = False) -> Archive:
    """The records of the archive at ``path``. Raises `FileFormatError` when it is damaged or no archive.

    ``mapped``: they are the pages of the file, which nobody may write to then, in place of a copy of its bytes.
    """
    data = _map(path) if mapped else _read(path)
    try:
        return Archive(_records(memoryview(data)), len(data))
    except FileFormatError as error:
        raise FileFormatError(f"{path} is not a .pt2 file, or was damaged: {error}") from error


def records_of(data: bytes | memoryview) -> dict[str, memoryview]:
    """The records of an archive that is in memory. Raises `FileFormatError`."""
    return _records(memoryview(data))


def _read(path: Path) -> bytes:
    """The bytes of a regular file, all from one opening of it."""
    try:
        with open(path, "rb", opener=_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FileFormatError(f"{path} does not exist, or is not a file")
            return file.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise FileFormatError(f"{path} does not exist, or is not a file") from error


def _map(path: Path) -> mmap:
    """The pages of a file that is not empty; they go when nothing refers to them any more."""
    with path.open("rb") as file:
        return mmap(file.fileno(), 0, access=ACCESS_READ)


def _at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe without a writer would keep its reader for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _records(data: memoryview) -> dict[str, memoryview]:
    start, end, count = _directory(data)
    entries = list(_entries(data[start:end], count))
    roots = {entry.name.partition("/")[0] for entry in entries}
    if len(roots) != 1:
        raise FileFormatError("it holds no records, or records outside of one folder")
    records: dict[str, memoryview] = {}
    position = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        name = entry.name.partition("/")[2]
        if entry.offset != position:
            raise FileFormatError(f"the record '{name}' does not follow the one in front of it")
        if name in records:
            raise FileFormatError(f"it holds two records '{name}'")
        records[name], position = _record(data[:start], entry)
    if position != start:
        raise FileFormatError("something stands between its records and their directory")
    return records


def _directory(data: memoryview) -> tuple[int, int, int]:
    """Where the directory begins and ends, and how many entries it has, by the end of the file."""
    position = len(data) - _END.size
    if position < 0 or not _at(data, position, b"PK\5\6"):
        raise FileFormatError("it does not end as an archive does")
    _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(data, position)
    end, wide = position, (here, count, size, start)
    locator = position - _LOCATOR64.size
    if locator >= 0 and _at(data, locator, b"PK\6\7"):
        _, on, end, disks = _LOCATOR64.unpack_from(data, locator)
        if on or disks != 1 or end + _END64.size != locator or not _at(data, end, b"PK\6\6"):
            raise FileFormatError("its end is damaged")
        _, length, made_by, needed, disk64, first64, *fields = _END64.unpack_from(data, end)
        for given, real, full in zip(wide, fields, (_FULL16, _FULL16, _FULL32, _FULL32), strict=True):
            if given not in (real, full) or (given == full and real < full):
                raise FileFormatError("its two ends say different things")
        if length != _END64.size - 12 or disk64 or first64 or (made_by, needed) not in _ENDS64:
            raise FileFormatError("its end is damaged")
        wide = (fields[0], fields[1], fields[2], fields[3])
    here, count, size, start = wide
    if disk or first_disk or comment or here != count or start + size != end:
        raise FileFormatError("its directory is damaged")
    return start, end, count


def _at(data: memoryview, position: int, mark: bytes) -> bool:
    return bytes(data[position : position + len(mark)]) == mark


def _entries(directory: memoryview, count: int) -> Iterator[_Entry]:
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(directory) or not _at(directory, position, b"PK\1\2"):
            raise FileFormatError("its directory is damaged")
        _, made_by, needed, flags, method, time, date, crc, packed, size, *rest = _ENTRY.unpack_from(
            directory, position
        )
        of_name, of_extra, of_comment, disk, internal, external, offset = rest
        position += _ENTRY.size
        name = _text(directory[position : position + of_name], of_name)
        extra = directory[position + of_name : position + of_name + of_extra]
        packed, size, offset = _wide(extra, (size, packed, offset))
        if method or packed != size:
            raise FileFormatError(f"its record '{name}' is compressed: only stored records are read")
        if made_by not in _MADE_BY or needed not in _MADE_BY:
            raise FileFormatError(f"its record '{name}' was written by no program that writes such files")
        if disk or internal or external or of_comment or flags not in (_PLAIN, _UTF8, _DESCRIBED):
            raise FileFormatError(f"its record '{name}' has attributes or flags, which no such record has")
        position += of_name + of_extra
        yield _Entry(name, needed, flags, (time, date), crc, size, offset)
    if position != len(directory):
        raise FileFormatError("its directory is damaged")


def _text(raw: memoryview, length: int) -> str:
    """The name of a record: any folder, and below it plain ASCII."""
    try:
        name = bytes(raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError("the name of a record is not text") from error
    folder, slash, inner = name.partition("/")
    if len(raw) != length or not slash or not folder.isprintable() or not _NAME.fullmatch(inner):
        raise FileFormatError(f"{name[:80]!r} is no name of a record of a plain program")
    return name


def _wide(extra: memoryview, fields: tuple[int, int, int]) -> tuple[int, int, int]:
    """Packed size, size and offset of an entry whose extra field holds those that need 64 bits, and nothing else."""
    full = [index for index, value in enumerate(fields) if value == _FULL32]
    if not full and not extra:
        return fields[1], fields[0], fields[2]
    values = list(fields)
    if len(extra) != 4 + 8 * len(full) or struct.unpack_from("<HH", extra) != (_ZIP64, 8 * len(full)) or not full:
        raise FileFormatError("an entry of its directory has an extra field, which no such entry has")
    for place, index in enumerate(full):
        (values[index],) = struct.unpack_from("<Q", extra, 4 + 8 * place)
    return values[1], values[0], values[2]


def _record(data: memoryview, entry: _Entry) -> tuple[memoryview, int]:
    """The bytes of a record, and where the next one begins; its header has to say what the directory says."""
    begin = entry.offset
    if begin + _HEADER.size > len(data) or not _at(data, begin, b"PK\3\4"):
        raise FileFormatError(f"the record '{entry.name}' is not where the directory says")
    _, needed, flags, method, time, date, crc, packed, size, of_name, of_extra = _HEADER.unpack_from(data, begin)
    begin += _HEADER.size
    name, extra = data[begin : begin + of_name], data[begin + of_name : begin + of_name + of_extra]
    begin += of_name + of_extra
    end = begin + entry.size
    if end > len(data) or len(extra) != of_extra:
        raise FileFormatError(f"the record '{entry.name}' is longer than the file")
    described = entry.flags == _DESCRIBED
    sizes = (0, 0, 0) if described else (entry.crc, min(entry.size, _FULL32), min(entry.size, _FULL32))
    same = (needed, flags, method, (time, date)) == (entry.needed, entry.flags, 0, entry.moment)
    if not same or bytes(name) != entry.name.encode() or (crc, packed, size) not in (sizes, _wide_sizes(entry)):
        raise FileFormatError(f"the record '{entry.name}' has another header than the directory says")
    _check_extra(extra, entry)
    if zlib.crc32(data[begin:end]) != entry.crc:
        raise FileFormatError(f"the record '{entry.name}' does not match its checksum")
    return data[begin:end], end + (_check_descriptor(data[end:], entry) if described else 0)


def _wide_sizes(entry: _Entry) -> tuple[int, int, int] | None:
    """Checksum and sizes in the header of a described record whose sizes need 64 bits."""
    return (0, _FULL32, _FULL32) if entry.flags == _DESCRIBED and entry.size >= _FULL32 else None


def _check_extra(extra: memoryview, entry: _Entry) -> None:
    """In front of data stand its sizes, when they need 64 bits, and padding; nothing else."""
    position = 0
    kinds = []
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        content = bytes(extra[position + 4 : position + 4 + length])
        position += 4 + length
        kinds.append(kind)
        padding = kind == _PADDING and content == b"Z" * length
        sizes = kind == _ZIP64 and entry.size >= _FULL32 and length >= 16
        if sizes and struct.unpack_from("<QQ", content) not in ((entry.size, entry.size), (0, 0)):
            break
        if not padding and not sizes:
            break
    else:
        if position == len(extra) and len(set(kinds)) == len(kinds):
            return
    raise FileFormatError(f"the record '{entry.name}' has an extra field, which no such record has")


def _check_descriptor(data: memoryview, entry: _Entry) -> int:
    """The sizes behind the data of a record; returns how many bytes they take."""
    for form in (_DESCRIPTOR, _DESCRIPTOR64):
        if len(data) >= form.size and form.unpack_from(data) == (b"PK\7\10", entry.crc, entry.size, entry.size):
            return form.size
    raise FileFormatError(f"the record '{entry.name}' is followed by other sizes than the directory says")
