"""Record of an Inductor package: what it takes, what it was made of and with what, as JSON in its zip.

AOTInductor's loader looks at the records of its own only. Reading this one runs nothing of the package.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quant2e.documents.json_text import read_json
from quant2e.documents.schema import from_record, of_format
from quant2e.errors import FileFormatError
from quant2e.report.encodings import Encodings
from quant2e.report.plain_data import plain_data
from quant2e.report.report import Report
from quant2e.storage.columns import from_columns, to_columns
from quant2e.storage.record import report_from_columns, report_to_columns, texts_without_folders
from quant2e.storage.writer.origins import source_file
from quant2e.storage.writer.program import as_json

PACKAGE_FORMAT = 1
_RECORD = "extra/quant2e_package.json"
_CODE = "data/aotinductor/"
_MOST = 1_000_000
"""Verdicts and groups that a record may hold."""
_LARGEST = 1 << 28
"""Bytes of a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageInput:
    """A tensor that a package takes, in the order of its flat inputs. ``sizes``: the least and the largest of each.

    ``channels_last``: it is compiled for that layout.
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[tuple[int, ...], ...]
    channels_last: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageRecord:
    """``versions``: of the libraries that made the package, by name. ``instructions``: what it is compiled for.

    ``inputs``: the tensors that it takes. ``report``, ``encodings``: of the quantized model that it was made of, with
    every scale. ``lowering``: what Inductor made of it, as plain data: kernels, notes, the comparison.
    """

    versions: Mapping[str, str]
    instructions: str
    inputs: tuple[PackageInput, ...]
    report: Report = field(default_factory=lambda: Report(verdicts=()))
    encodings: Encodings = field(default_factory=lambda: Encodings("", ()))
    lowering: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "versions": dict(self.versions),
            "instructions": self.instructions,
            "inputs": [plain_data(one) for one in self.inputs],
            "report": self.report.as_dict(),
            "encodings": self.encodings.as_dict(),
            "lowering": dict(self.lowering),
        }


def is_package(path: Path) -> bool:
    """Whether a file is a package of AOTInductor, whoever made it; False for what is no zip. Raises OSError."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return any(f"/{_CODE}" in f"/{name}" for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def with_record(content: bytes, record: PackageRecord) -> bytes:
    """The bytes of a package, a zip without a comment, with a record more."""
    stream = io.BytesIO(content)
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(zipfile.ZipInfo(f"{root}/{_RECORD}"), _text(record))
    return stream.getvalue()


def read_package_record(path: Path) -> PackageRecord | None:
    """What a package of ours says of itself; None for one of others, or of an earlier version.

    Raises `FileFormatError` when the record is damaged or the file is no zip, OSError when it cannot be read.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.partition("/")[2] == _RECORD]
            if not names:
                return None
            if len(names) > 1 or archive.getinfo(names[0]).file_size > _LARGEST:
                raise FileFormatError(f"{path} is damaged: its record is none")
            text = archive.read(names[0])
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        raise FileFormatError(f"{path} is no package, or is damaged: {error}") from error
    try:
        return _read(read_json(text, "its record"))
    except FileFormatError as error:
        raise FileFormatError(f"{path} is damaged: {error}") from error


def _text(record: PackageRecord) -> bytes:
    files = {source_file(verdict.op.source) for verdict in record.report.verdicts} - {""}
    encodings = record.encodings.as_dict()
    data = {
        **record.as_dict(),
        "format": PACKAGE_FORMAT,
        "report": report_to_columns(record.report.as_dict()),
        "encodings": {**encodings, "groups": to_columns(encodings["groups"])},
    }
    return as_json(texts_without_folders(data, files))


def _read(data: Any) -> PackageRecord:
    of_format(data, (PACKAGE_FORMAT,), "its record")
    try:
        report = Report.from_dict(report_from_columns(data["report"], _MOST))
        groups = from_columns(data["encodings"]["groups"], "the groups of the encodings", _MOST)
        encodings = Encodings.from_dict({**data["encodings"], "groups": groups})
        lowering = data["lowering"]
        plain = from_record(_Plain, data, "its record", besides=("format", "report", "encodings", "lowering"))
    except FileFormatError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"its record is damaged: {error}") from error
    if not isinstance(lowering, dict):
        raise FileFormatError("its record is damaged: what is said of its kernels is no object")
    return PackageRecord(
        versions=plain.versions,
        instructions=plain.instructions,
        inputs=plain.inputs,
        report=report,
        encodings=encodings,
        lowering=lowering,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plain:
    """The part of a record that type hints describe."""

    versions: Mapping[str, str]
    instructions: str
    inputs: tuple[PackageInput, ...]
