"""Manifest of a ``.pt2`` file: the SHA-256 of every other record, so that no bit of a file changes unnoticed.

    {"format":1,"sha256":{"archive_format":"…", "data/weights/weight_0":"…", …}}     names sorted, no spaces

The text follows from the records, so a manifest is checked by writing it anew: what differs in one byte is refused, and
a damaged manifest is read only to say which record it disagrees with. It finds damage and careless edits. It is no
signature: who edits a file on purpose can write a manifest that fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quant2e.errors import FileFormatError
from quant2e.storage.writer.values import Bytes

MANIFEST = "extra/quant2e_manifest.json"
"""Name of the record, without the folder around all records of an archive."""

MANIFEST_FORMAT = 1
_NAMED = 3
"""How many records a message names."""


def sha256(data: Bytes) -> str:
    """The hash of one record, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def manifest_text(hashes: Mapping[str, str]) -> bytes:
    """The manifest for records with these hashes, by name; its own name is not among them."""
    listed = {name: hashes[name] for name in sorted(hashes)}
    return json.dumps({"format": MANIFEST_FORMAT, "sha256": listed}, separators=(",", ":")).encode("ascii")


def with_manifest(records: Iterable[tuple[str, Bytes]]) -> Iterator[tuple[str, Bytes]]:
    """``records``, and behind the last of them their manifest."""
    hashes = {}
    for name, data in records:
        hashes[name] = sha256(data)
        yield name, data
    yield MANIFEST, manifest_text(hashes)


def check_manifest(records: Mapping[str, Bytes]) -> bool:
    """Whether ``records``, all of an archive by their names without its folder, have a manifest; it is then checked.

    A file of record format 1 or 2, or of another program, has none. Raises `FileFormatError`, naming the records, when
    one of them changed, is missing, or is not in the manifest, and when the manifest is damaged.
    """
    if MANIFEST not in records:
        return False
    hashes = {name: sha256(data) for name, data in records.items() if name != MANIFEST}
    written = bytes(records[MANIFEST])
    if written != manifest_text(hashes):
        raise FileFormatError(f"the file was damaged or edited after it was saved: {_difference(written, hashes)}")
    return True


def _difference(written: bytes, hashes: Mapping[str, str]) -> str:
    """What is wrong with records that a manifest does not fit."""
    try:
        expected: Any = json.loads(written)["sha256"]
        changed = [name for name in hashes if name in expected and expected[name] != hashes[name]]
        added = [name for name in hashes if name not in expected]
        missing = [str(name) for name in expected if name not in hashes]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return f"'{MANIFEST}' is not readable"
    found = (("changed", changed), ("not in the manifest", added), ("missing", missing))
    wrong = [f"{what}: {_names(names)}" for what, names in found if names]
    return "; ".join(wrong) or f"'{MANIFEST}' is not in the form that quant2e writes"


def _names(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(f"'{name[:80]}'" for name in listed[:_NAMED]) + more
