"""Archives for tests: the records of a ``.pt2`` file, and files with other records, in the form that readers accept."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quant2e.storage.manifest import MANIFEST, manifest_text, sha256

MODEL = "models/model.json"


def records_in(path: Path) -> dict[str, bytes]:
    """The records of an archive by their names without its folder."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def zipped(records: Mapping[str, bytes], root: str = "archive") -> bytes:
    """A zip of stored records without attributes; ``root``: the folder around them, empty for none."""
    data, directory = b"", b""
    for name, content in records.items():
        full = f"{root}/{name}".removeprefix("/").encode()
        sizes = (0, 0, 0, 0x21, zlib.crc32(content), len(content), len(content), len(full), 0)
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, *sizes, 0, 0, 0, 0, len(data)) + full
        data += struct.pack("<4s5H3I2H", b"PK\3\4", 20, *sizes) + full + content
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(records), len(records), len(directory), len(data), 0)
    return data + directory + end


def with_hashes(records: Mapping[str, bytes]) -> dict[str, bytes]:
    """The records with a manifest that fits them, as somebody writes it who edits a file on purpose."""
    others = {name: data for name, data in records.items() if name != MANIFEST}
    return {**others, MANIFEST: manifest_text({name: sha256(data) for name, data in others.items()})}


def rewritten(path: Path, target: Path, edit: Callable[[Any], None] | None = None, /, **parts: bytes | None) -> Path:
    """A copy of an archive with hashes that fit: ``edit`` changes the program's JSON in place, ``parts`` are replaced,
    added, or left out (None).
    """
    records = records_in(path)
    if edit is not None:
        program = json.loads(records[MODEL])
        edit(program)
        records[MODEL] = json.dumps(program).encode()
    records |= {name: data for name, data in parts.items() if data is not None}
    kept = {name: data for name, data in records.items() if name not in parts or parts[name] is not None}
    target.write_bytes(zipped(with_hashes(kept) if MANIFEST in records else kept))
    return target
