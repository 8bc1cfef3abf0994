"""Checksums inside files: the SHA-256 of a file, held in a text of the file itself, whatever its format.

The text is ``quant2e_sha256:<64 hexadecimal digits>:quant2e_sha256``. The digits are those of the SHA-256 of all bytes
of the file, taken with 64 zeros in their place, so it needs no parser to check them. Wherever in a file the word is
found, the whole text must be there, once, and match: no single damage turns a file with a checksum into one without.

A file may also name files that lie beside it and are read with it, by ``quant2e_beside:<suffix>:<SHA-256>``: its own
checksum covers that text, and so the bytes of the others.

A checksum tells damage and edits. It is no signature: who makes a file on purpose can give it one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path

from quant2e.errors import FileFormatError

WORD = "quant2e_sha256"
"""What marks a checksum. Formats that have named entries use it as the name as well."""

BLANK = f"{WORD}:{'0' * 64}:{WORD}"
"""What a writer puts into a file, for `sealed` to fill in."""

_BESIDE = re.compile(rb"quant2e_beside:(\.[a-z]{1,8}):([0-9a-f]{64})")

_TEXT = re.compile(rb"%b:([0-9a-f]{64}):%b" % (WORD.encode(), WORD.encode()))


def sealed(content: bytes) -> bytes:
    """The bytes of a file that holds `BLANK` once, with the digits filled in."""
    start, end = _digits(content)
    assert content[start:end] == b"0" * 64, "a checksum is filled in once"
    return b"".join((content[:start], _sha256(content, start, end).encode(), content[end:]))


def check_content(content: bytes | mmap, name: str) -> bool:
    """Whether a file has a checksum. Raises `FileFormatError`, with ``name``, where it does not match."""
    if content.find(WORD.encode()) < 0:
        return False
    try:
        start, end = _digits(content)
    except ValueError as error:
        raise FileFormatError(f"{name} is damaged: {error}. Write it again from its model") from None
    if content[start:end].decode() != _sha256(content, start, end):
        raise FileFormatError(
            f"{name} was damaged, or edited, since it was written: its bytes do not have the SHA-256 that it carries. "
            f"Write it again from its model"
        )
    return True


def beside_text(suffix: str, digits: str) -> str:
    """What a file holds to know another by: of its name but for ``suffix``, and with that SHA-256."""
    return f"quant2e_beside:{suffix}:{digits}"


def check_beside(content: bytes | mmap, path: Path, given: Mapping[str, bytes] | None = None) -> None:
    """Raise `FileFormatError` where a file beside ``path`` is not the one that ``content`` was written with.

    ``content``: of ``path``, whose own checksum matches. ``given``: bytes by suffix of files that were read already.
    """
    for suffix, digits in ((m[1].decode(), m[2].decode()) for m in _BESIDE.finditer(content)):
        other = path.with_suffix(suffix)
        if given is not None and suffix in given:
            found = hashlib.sha256(given[suffix]).hexdigest()
        elif other.is_file():
            with other.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            raise FileFormatError(f"{path} is one of two files, and {other} is not there: keep them together")
        if found != digits:
            raise FileFormatError(
                f"{other} is not what {path} was written with: one of them was damaged, edited or exchanged. "
                f"Write both again from their model"
            )


def check_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file of `to_executorch`, `to_onnx`, `to_openvino` or `package_inductor` is as it was written.

    True: it carries a SHA-256, and its bytes match it. False: it carries none, because something else made it, or a
    version from before there was one; nothing tells then whether it is whole. What `quant2e.save` wrote is checked by
    `quant2e.load`, and has no such text. Of an ``.xml``, the ``.bin`` beside it is checked with it.

    Raises `FileFormatError` for a file that was damaged or edited since it was written, OSError when it cannot be read.
    """
    with Path(path).open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise FileFormatError(f"{path} is empty")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            unchanged = check_content(content, str(path))
            if unchanged:
                check_beside(content, Path(path))
            return unchanged


def _digits(content: bytes | mmap) -> tuple[int, int]:
    """Where the digits are. Raises ValueError unless they are in one place."""
    spans, at = [], content.find(WORD.encode())
    while at >= 0:
        if found := _TEXT.match(content, at):
            spans.append(found.span(1))
        at = content.find(WORD.encode(), at + 1)
    if len(spans) != 1:
        raise ValueError("it carries two checksums" if spans else "what is left of its checksum cannot be read")
    return spans[0]


def _sha256(content: bytes | mmap, start: int, end: int) -> str:
    """Of the content with zeros in place of the digits."""
    view, total = memoryview(content), hashlib.sha256()
    for part in (view[:start], b"0" * 64, view[end:]):
        total.update(part)
    return total.hexdigest()
