"""Record of a file: report, encodings, integer inputs and outputs, and what the example inputs look like, as JSON.

Format 1 spells the scales of channels; format 2 names the buffers that hold them; format 3 describes example inputs,
and writes verdicts and groups as columns; in files of format 4 constants may be compact (`quant2e.storage.compact`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch.fx import GraphModule

from quant2e.documents.json_text import read_json
from quant2e.documents.schema import of_format
from quant2e.errors import FileFormatError
from quant2e.quantized_io import QuantizedIO, quantized_io_of
from quant2e.report.encodings import Encodings, encodings_record
from quant2e.report.report import Report, Verdict
from quant2e.storage.columns import from_columns, to_columns
from quant2e.storage.example_inputs import describe_inputs, restore_inputs
from quant2e.storage.parameters import name_buffers, read_buffers
from quant2e.storage.writer.lifting import lifted_tensors
from quant2e.storage.writer.origins import source_file, without_folders
from quant2e.storage.writer.program import as_json

RECORD = "quant2e.json"
"""Name of the extra file that holds the record."""

RECORD_FORMAT = 4
HASHED_FORMATS = (3, RECORD_FORMAT)
"""Formats whose files have a manifest, and whose records are columns."""

_READABLE = (1, 2, *HASHED_FORMATS)


_SPARE = 10_000
"""Verdicts and groups that a record may hold beyond four for each node of its graph."""


def record_text(
    report: Report, encodings: Encodings, module: GraphModule, inputs: Sequence[Any], *, with_data: bool
) -> bytes:
    """The record of ``module``. ``inputs``: its flat example inputs, whose data is kept only ``with_data``."""
    record = {
        "format": RECORD_FORMAT,
        "report": report_to_columns(report.as_dict()),
        "recipe": _groups_as_columns(_with_file_paths(name_buffers(encodings_record(encodings), module), module)),
        "example_inputs": describe_inputs(inputs, data=with_data),
    }
    if quantized_io := quantized_io_of(module):
        record["boundary"] = quantized_io.as_dict()
    files = {source_file(verdict.op.source) for verdict in report.verdicts} - {""}
    return as_json(texts_without_folders(record, files))


def report_to_columns(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report of `Report.as_dict`; what is said of each op is a column, too."""
    verdicts = [{**verdict, "op": None, **verdict["op"]} for verdict in report["verdicts"]]
    return {**report, "verdicts": to_columns(verdicts)}


def report_from_columns(report: Mapping[str, Any], most: int) -> dict[str, Any]:
    """The inverse of `report_to_columns`; at most so many verdicts. Raises `FileFormatError`."""
    verdicts = from_columns(report["verdicts"], "the verdicts in the report", most)
    own = [field.name for field in fields(Verdict)]
    nested = [
        {**{name: row[name] for name in own}, "op": {key: value for key, value in row.items() if key not in own}}
        for row in verdicts
    ]
    return {**report, "verdicts": nested}


def _with_file_paths(encodings: Mapping[str, Any], module: GraphModule) -> dict[str, Any]:
    """Encodings whose buffers are named as the program in the file names them."""
    paths = {item.source: item.path for item in lifted_tensors(module)}

    def renamed(group: Mapping[str, Any]) -> dict[str, Any]:
        buffers = {key: paths[group[key]] for key in ("scale", "zero_point") if isinstance(group[key], str)}
        return {**group, **buffers}

    return {**encodings, "groups": [renamed(group) for group in encodings["groups"]]}


def _groups_as_columns(encodings: Mapping[str, Any]) -> dict[str, Any]:
    return {**encodings, "groups": to_columns(encodings["groups"])}


def _groups_from_columns(encodings: Mapping[str, Any], most: int) -> dict[str, Any]:
    return {**encodings, "groups": from_columns(encodings["groups"], "the groups of the encodings", most)}


def texts_without_folders(data: Any, files: Collection[str]) -> Any:
    """Plain data whose texts tell nothing of the folders in which the user's files lie, nor of their text."""
    if isinstance(data, str):
        return without_folders(data, files)
    if isinstance(data, Mapping):
        return {key: texts_without_folders(value, files) for key, value in data.items()}
    return [texts_without_folders(value, files) for value in data] if isinstance(data, (list, tuple)) else data


def read_record(text: str | bytes) -> Mapping[str, Any]:
    """The record as plain data; empty for a file without one. Raises `FileFormatError`."""
    if not text:
        return {}
    record: Mapping[str, Any] = read_json(text, "the report in the file")
    of_format(record, _READABLE, "the report in the file")
    return record


def read_results(record: Mapping[str, Any], module: GraphModule) -> tuple[Report, Encodings, QuantizedIO]:
    """Report, encodings and integer inputs and outputs of the graph of a file. Raises `FileFormatError`."""
    if not record:
        return Report(verdicts=()), Encodings("", ()), QuantizedIO()
    try:
        quantized_io = QuantizedIO.from_dict(record["boundary"]) if "boundary" in record else QuantizedIO()
        report, encodings = record["report"], record["recipe"]
        if record["format"] in HASHED_FORMATS:
            most = _SPARE + 4 * len(module.graph.nodes)
            report, encodings = report_from_columns(report, most), _groups_from_columns(encodings, most)
        return Report.from_dict(report), Encodings.from_dict(read_buffers(encodings, module)), quantized_io
    except FileFormatError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"the report in the file is damaged: {error}") from error


def read_example_inputs(record: Mapping[str, Any]) -> tuple[list[Any], bool] | None:
    """The flat example inputs, and whether they are stand-ins; None where a record of an older format has none."""
    return restore_inputs(record["example_inputs"]) if "example_inputs" in record else None
