"""Arrays from files: ``.npy`` and zip archives of them, read as what they say they are and no larger than they are."""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from quant2e.errors import FileFormatError

Array = np.ndarray[Any, Any]

RATIO = 64
"""How many times smaller deflate may have made a member that is written here; a sparse histogram comes close."""

ALLOWANCE = 1 << 26
"""Bytes that all members of one archive may have beyond `RATIO` times the archive's own."""

_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    r"\{'descr': '(?P<dtype>[<>|=][biuf][1248])', 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>(?:\d{1,15}(?:, ?|(?=\))))*)\),? ?\} *\n?"
)
"""The description that numpy writes in front of an array, for plain numbers."""

_MOST_DIMENSIONS = 16


def read_archive(path: Path, what: str) -> dict[str, bytes]:
    """The members of a zip archive by name, in their order. ``what`` says what the file should be.

    Raises `FileFormatError` for a file that is missing, cut off or damaged, that holds a name twice, or whose members
    would take much more memory than the file does; OSError when it cannot be read.
    """
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist, or is not a file")
    raw = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = archive.infolist()
            _check_sizes(members, len(raw), path)
            return {member.filename: archive.read(member) for member in members}
    except FileFormatError:
        raise
    except Exception as error:  # of zipfile, zlib, struct, the codecs: no list of theirs is complete
        raise FileFormatError(f"{path} is no {what}, or is damaged: {error}") from error


def _check_sizes(members: list[zipfile.ZipInfo], size: int, path: Path) -> None:
    names = {member.filename for member in members}
    if len(names) != len(members):
        raise FileFormatError(f"{path} is damaged: it holds two members of one name")
    packed, unpacked = (sum(getattr(m, part) for m in members) for part in ("compress_size", "file_size"))
    if packed > size or unpacked > RATIO * size + ALLOWANCE:
        raise FileFormatError(
            f"{path} has {size:,} bytes and says that it holds {unpacked:,}: it is damaged, or was made to fill the "
            f"memory; an honest file of so sparse numbers is written without compression (numpy.savez)"
        )


def read_array(raw: bytes, what: str) -> Array:
    """The array of a ``.npy`` file, given as bytes; writable, in native byte order. ``what`` names it in errors.

    Numbers and booleans only. Raises `FileFormatError` for anything else, and unless the bytes are as many as dtype
    and shape say.
    """
    text, begin = _header(raw, what)
    found = _HEADER.fullmatch(text)
    if found is None:
        raise FileFormatError(f"{what} is no array of plain numbers: {text.strip()[:80]!r}")
    dtype = _dtype_of(found["dtype"], what)
    shape = tuple(int(size) for size in re.findall(r"\d+", found["shape"]))
    if len(shape) > _MOST_DIMENSIONS or math.prod(shape) * dtype.itemsize != len(raw) - begin:
        held = len(raw) - begin
        raise FileFormatError(f"{what} is damaged: it says {dtype}{list(shape)} and holds {held:,} bytes of numbers")
    order: Literal["F", "C"] = "F" if found["fortran"] == "True" else "C"
    try:
        array = np.frombuffer(raw[begin:], dtype=dtype).reshape(shape, order=order)
    except ValueError as error:  # no numbers at all, in a shape that numpy has no index for
        raise FileFormatError(f"{what} is damaged: it says {dtype}{list(shape)}") from error
    if dtype.kind == "b":
        array = array.view(np.uint8) != 0  # a byte may hold anything
    return np.array(array, dtype=dtype.newbyteorder("="), order="C")


def _header(raw: bytes, what: str) -> tuple[str, int]:
    """The description of the array, and where its numbers begin."""
    major = raw[6] if raw[: len(_MAGIC)] == _MAGIC and len(raw) > 12 else 0
    if major not in (1, 2, 3):
        raise FileFormatError(f"{what} is no array file of numpy (.npy)")
    width = 2 if major == 1 else 4
    begin = 8 + width + int.from_bytes(raw[8 : 8 + width], "little")
    if begin > len(raw):
        raise FileFormatError(f"{what} was cut off")
    return raw[8 + width : begin].decode("latin1"), begin


def _dtype_of(text: str, what: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(text)
    except TypeError as error:
        raise FileFormatError(f"{what} is no array of plain numbers: {text!r}") from error
    return dtype


def write_archive(part: Path, members: Mapping[str, bytes]) -> None:
    """Write what `read_archive` reads: deflated, except for what deflate would make more than `RATIO` times smaller."""
    with zipfile.ZipFile(part, "w") as archive:
        for name, raw in members.items():
            sparse = len(zlib.compress(raw, 1)) * RATIO < len(raw)
            archive.writestr(name, raw, zipfile.ZIP_STORED if sparse else zipfile.ZIP_DEFLATED, compresslevel=1)
