"""File reader: a ``.pt2`` file becomes a program and what lies beside it, all from one reading of its bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant2e.errors import FileFormatError
from quant2e.storage.compact import restore_constants
from quant2e.storage.manifest import check_manifest
from quant2e.storage.qdq_check import check_parameters
from quant2e.storage.reader.archive import Archive, open_archive
from quant2e.storage.reader.pickled_inputs import inert_inputs
from quant2e.storage.reader.program import StoredProgram, stored_program
from quant2e.storage.reader.tensors import read_tensors

_MODEL = re.compile(r"models/([^/]+)\.json")
_FIXED = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little"}
"""Records that say what the file is, and what they say."""

_VERSION = re.compile(rb"[1-9]\d?\n?")
_STAMP = re.compile(rb"[\w.-]{1,100}\n?")
_OF_THE_ZIP: Mapping[str, re.Pattern[bytes]] = {
    ".data/version": _VERSION, "version": _VERSION, ".data/serialization_id": _STAMP, ".format_version": _STAMP,
    ".storage_alignment": _STAMP,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class FileContents:
    """What a file holds. ``extra``: records beside the program, by name. ``hashed``: each record matches its SHA-256.

    ``example_inputs``: positional and keyword inputs that torch keeps with a program; None where there are none.
    """

    program: StoredProgram
    extra: Mapping[str, memoryview]
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None
    hashed: bool


def read_file(path: Path, *, mapped: bool = False) -> FileContents:
    """Read a ``.pt2`` file. Nothing in it is run, imported or called, whatever it holds.

    ``mapped``: tensors are the pages of the file, only to be looked at, and nobody may write to it meanwhile; those in
    short forms are unpacked where they are read.

    Raises `FileFormatError` when it is damaged, of another kind, of a later version, or holds anything but a program
    of ops that compute tensors.
    """
    archive = open_archive(path, mapped=mapped)
    try:
        hashed = check_manifest(archive.records)
        return _contents(archive, hashed, copied=not mapped)
    except FileFormatError as error:
        raise FileFormatError(f"{path} cannot be read: {error}") from error


def _contents(archive: Archive, hashed: bool, *, copied: bool) -> FileContents:
    records = archive.records
    models = [match[1] for name in records if (match := _MODEL.fullmatch(name))]
    if len(models) != 1:
        raise FileFormatError(f"it holds {len(models)} programs, and should hold one")
    (model,) = models
    _check_stamps(records)
    weights, of_weights = read_tensors(archive, "weights", model, copied=copied)
    constants, of_constants = read_tensors(archive, "constants", model, copied=copied)
    inputs = f"data/sample_inputs/{model}.pt"
    known = {f"models/{model}.json", *of_weights, *of_constants, inputs, *_FIXED, *_OF_THE_ZIP}
    for name in records:
        if name not in known and not name.startswith("extra/"):
            raise FileFormatError(
                f"it holds '{name[:120]}', which is no part of a plain program: pickled objects and compiled code can "
                "run anything when they are loaded"
            )
    program = stored_program(records[f"models/{model}.json"], weights, constants)
    restore_constants(program.module, unpacked=copied)
    check_parameters(program.module)
    return FileContents(
        program=program,
        extra={name.removeprefix("extra/"): data for name, data in records.items() if name.startswith("extra/")},
        example_inputs=inert_inputs(records[inputs]) if inputs in records else None,
        hashed=hashed,
    )


def _check_stamps(records: Mapping[str, memoryview]) -> None:
    """The records that name formats and versions."""
    for name, said in _FIXED.items():
        if name in records and bytes(records[name]).strip() != said:
            raise FileFormatError(f"its '{name}' is {bytes(records[name])[:40]!r}, and should be {said!r}")
    for name, form in _OF_THE_ZIP.items():
        if name in records and not form.fullmatch(bytes(records[name][:200])):
            raise FileFormatError(f"its '{name}' is {bytes(records[name])[:40]!r}, which is none")
    if "archive_format" not in records or "archive_version" not in records:
        raise FileFormatError("it does not say that it is a program of torch.export")
