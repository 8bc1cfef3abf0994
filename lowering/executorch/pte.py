"""Structure of ``.pte`` files, looked at before the runtime is: sizes and offsets that lie, and other kinds of files.

    root offset │ ET12 │ eh00, length, program size, segment base, segment size │ flatbuffer … │ segments …

The runtime aborts the process on some of what is refused here. Behind the root of the flatbuffer nothing is looked at:
what a delegate holds is the delegate's own.
"""

from __future__ import annotations

import struct

from quant2e.errors import FileFormatError

_MAGIC, _HEADER_MAGIC = b"ET12", b"eh00"
_HEADER_AT, _HEADER_LEAST, _HEADER_FULL = 8, 24, 32
"""Where the extended header begins, its length without the size of the segments, and with it."""


def check_structure(content: bytes, name: str) -> None:
    """Raise `FileFormatError`, with ``name``, for bytes that are no program of ExecuTorch, or part of one."""
    if content[4:8] != _MAGIC:
        raise FileFormatError(
            f"{name} is not a program of ExecuTorch: its bytes 4 to 8 are {content[4:8]!r}, not {_MAGIC!r}"
        )
    try:
        _check_root(content, _program_size(content))
    except struct.error:
        raise FileFormatError(f"{name} is damaged, or was cut off: it has {len(content):,} bytes") from None
    except ValueError as error:
        raise FileFormatError(f"{name} is damaged, or was cut off: {error}") from None


def _program_size(content: bytes) -> int:
    """The size of the flatbuffer, as the extended header says; ValueError when what it says cannot be."""
    if content[_HEADER_AT : _HEADER_AT + 4] != _HEADER_MAGIC:
        return len(content)
    length, program, base, segments = struct.unpack_from("<IQQQ", content, _HEADER_AT + 4)
    if length < _HEADER_LEAST or _HEADER_AT + length > program:
        raise ValueError(f"its header says that it is {length:,} bytes long")
    if base and base < program:
        raise ValueError(f"its segments begin at {base:,}, inside of the program of {program:,} bytes")
    end = max(program, base + (segments if length >= _HEADER_FULL else 0))
    if end > len(content):
        raise ValueError(f"it has {len(content):,} bytes, and by its header {end:,} or more")
    return int(program)


def _check_root(content: bytes, size: int) -> None:
    """Raise ValueError unless the root table of the flatbuffer and its field list are within ``size`` bytes."""
    (root,) = struct.unpack_from("<I", content)
    if not _HEADER_AT <= root <= size - 4:
        raise ValueError(f"its root is at {root:,} of {size:,} bytes")
    fields = root - struct.unpack_from("<i", content, root)[0]
    if not 0 <= fields <= size - 4:
        raise ValueError(f"the fields of its root are at {fields:,} of {size:,} bytes")
    length, table = struct.unpack_from("<HH", content, fields)
    if length < 4 or length % 2 or table < 4 or max(fields + length, root + table) > size:
        raise ValueError("the fields of its root are not within it")
    offsets = struct.unpack_from(f"<{(length - 4) // 2}H", content, fields + 4)
    if any(offset > table - 4 for offset in offsets if offset):
        raise ValueError("a field of its root is not within it")
