"""The two files of a model: the graph in an ``.xml``, and its constants in a ``.bin`` of the same name.

The ``.xml`` carries a SHA-256 of itself and one of the ``.bin``, so that the two are checked as one: weights of another
model are found, though OpenVINO itself would take them.

No file system moves two files at once. `write_pair` writes and flushes both under temporary names, takes the old
``.xml`` away, moves the new ``.bin`` into place, and the new ``.xml`` last. Who looks in between, or after a process
was killed there, finds no ``.xml``, and so no model, rather than the graph of one with the weights of another.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from quant2e.checksum import beside_text, check_beside, check_content
from quant2e.errors import FileFormatError, LoweringError
from quant2e.files import atomic_file

XML, BIN = ".xml", ".bin"


def weights_path(path: Path) -> Path:
    """Where the constants of the model at ``path`` are: OpenVINO looks nowhere else."""
    return path.with_suffix(BIN)


def check_name(path: Path) -> None:
    """Raise `LoweringError` for a path that does not end in ``.xml``."""
    if path.suffix != XML:
        raise LoweringError(
            f"{path}: an OpenVINO model is an {XML} file with its constants in a {BIN} of the same name: give a path "
            f"that ends in {XML}"
        )


def seal_of(weights: bytes) -> str:
    """What an ``.xml`` holds to know its ``.bin`` by."""
    return beside_text(BIN, hashlib.sha256(weights).hexdigest())


def write_pair(path: Path, xml: bytes, weights: bytes) -> None:
    """Write both files. On an error before the ``.bin`` was replaced, both are as they were.

    Raises OSError, and `LoweringError` for a path that does not end in ``.xml``.
    """
    check_name(path)
    graph, beside = Path(os.path.realpath(path)), weights_path(path)
    with atomic_file(path) as part:
        part.write_bytes(xml)
        old, before = graph.read_bytes() if graph.exists() else None, _identity(beside)
        try:
            with atomic_file(beside) as weights_part:
                weights_part.write_bytes(weights)
                graph.unlink(missing_ok=True)
        except BaseException:
            if old is not None and not graph.exists() and _identity(beside) == before:
                with atomic_file(graph) as again:
                    again.write_bytes(old)
            raise


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def read_pair(path: Path) -> tuple[bytes, bytes, bool]:
    """Both files, and whether they carry checksums of ours. A model without constants may have no ``.bin``.

    Raises `FileFormatError` where either was damaged or exchanged since they were written, OSError.
    """
    xml, beside = path.read_bytes(), weights_path(path)
    if not xml.lstrip().startswith(b"<"):
        raise FileFormatError(f"{path} is no OpenVINO model: it is not XML")
    weights = beside.read_bytes() if beside.exists() else b""
    unchanged = check_content(xml, str(path))
    if unchanged:
        check_beside(xml, path, {BIN: weights})
    return xml, weights, unchanged
