"""Quantized models on disk: an ExportedProgram (``.pt2``) that carries its report and encodings.

The file is one that ``torch.export.load`` reads, in any process where torch's own q/dq ops are registered
(``import torch.ao.quantization.fx._decomposed``). Importing this module registers them, through
`quant2e.graph.qdq_ops`; `read_pt2` gives report and encodings back, and refuses files that could run code.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from quant2e.errors import FileFormatError, Quant2eError, user_frame
from quant2e.files import atomic_file
from quant2e.graph.captured.capture import as_graph_module
from quant2e.graph.captured.inputs import distinct
from quant2e.isolation import tracing
from quant2e.quantized_io import QUANTIZED_IO, QuantizedIO, quantized_io_of
from quant2e.report.encodings import Encodings
from quant2e.report.report import Report
from quant2e.storage.archive_check import check_archive
from quant2e.storage.parameters import name_buffers, read_buffers

RECORD = "quant2e.json"
"""Name of the extra file that holds report, encodings, and the parameters of integer inputs and outputs."""

RECORD_FORMAT = 2
_READABLE = (1, RECORD_FORMAT)


@dataclass(frozen=True, slots=True, eq=False)
class Pt2Contents:
    """What a ``.pt2`` file holds: the graph, what is on record about it, and what it was captured with."""

    module: GraphModule
    report: Report
    encodings: Encodings
    example_inputs: tuple[Any, ...]
    example_kwargs: dict[str, Any]
    dynamic_shapes: Any


@tracing()
def write_pt2(path: str | Path, contents: Pt2Contents) -> None:
    """Write ``contents`` to ``path``; the suffix is ``.pt2``.

    The file appears under ``path`` only when it is complete. Raises `Quant2eError` when the graph cannot be exported,
    OSError when the file cannot be written; ``path`` is then as it was.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise Quant2eError(f"'{target.name}': the suffix of an exported program is .pt2")
    module, record = contents.module, _as_record(contents)
    try:
        args, kwargs = distinct(contents.example_inputs, contents.example_kwargs)
        program = torch.export.export(module, args, kwargs, dynamic_shapes=contents.dynamic_shapes, strict=False)
    except Exception as error:
        raise Quant2eError(f"the quantized graph cannot be exported with these inputs: {error}") from error
    _trim(program.graph_module)
    with atomic_file(target) as part:
        # Not the path: torch writes its name into the file. And torch aborts the process when a write fails.
        with _PatientFile(part, "wb") as file:
            torch.export.save(program, file, extra_files={RECORD: json.dumps(record)})
        try:
            check_archive(part)
        except FileFormatError as error:
            raise Quant2eError(f"this program could be saved, but not loaded again: {error}") from error


def _trim(gm: GraphModule) -> None:
    """Keep, of what nodes say about their origin, the module and the user's own line: the rest is a tenth of a file."""
    for node in gm.graph.nodes:
        node.meta.pop("from_node", None)
        if frame := user_frame(node):
            node.meta["stack_trace"] = frame
        if stack := node.meta.get("nn_module_stack"):
            # torch's keys are its own spelling of the path beside them
            node.meta["nn_module_stack"] = {str(entry[0]) or "L__self__": entry for entry in stack.values()}


class _PatientFile(io.FileIO):
    """A file whose writes never fail: the first failure is kept, and raised when the file is closed."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest and self.failure is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.failure = error
        return len(data)

    def close(self) -> None:
        super().close()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


def _as_record(contents: Pt2Contents) -> dict[str, Any]:
    encodings = name_buffers(contents.encodings.as_dict(), contents.module)
    record = {"format": RECORD_FORMAT, "report": contents.report.as_dict(), "recipe": encodings}
    if quantized_io := quantized_io_of(contents.module):
        record["boundary"] = quantized_io.as_dict()
    return record


@tracing()
def read_pt2(path: str | Path) -> Pt2Contents:
    """Read what `write_pt2` wrote; the outputs are bit-identical.

    Also reads any other ``.pt2`` of torch.export, with an empty report. No code of the file is executed. Raises
    `FileFormatError` for a file that is damaged, of another kind, or that could run code.
    """
    source = Path(path)
    check_archive(source)
    extra: dict[str, Any] = {RECORD: ""}
    try:
        program = torch.export.load(source, extra_files=extra)
    except Exception as error:
        raise FileFormatError(f"{source} cannot be read as an exported program: {error}") from error
    args, kwargs = program.example_inputs or ((), {})
    module = as_graph_module(program)
    report, encodings, quantized_io = _record(source, extra[RECORD], module)
    if quantized_io:
        module.meta[QUANTIZED_IO] = quantized_io
    return Pt2Contents(
        module=module,
        report=report,
        encodings=encodings,
        example_inputs=tuple(args),
        example_kwargs=dict(kwargs),
        dynamic_shapes=_dynamic_shapes(program),
    )


def _record(source: Path, text: str | bytes, module: GraphModule) -> tuple[Report, Encodings, QuantizedIO]:
    if not text:
        return Report(verdicts=()), Encodings("", ()), QuantizedIO()
    try:
        record = json.loads(text)
        if record["format"] not in _READABLE:
            raise FileFormatError(
                f"{source} has a record of format {record['format']!r}; this version reads "
                f"formats {' and '.join(str(known) for known in _READABLE)}"
            )
        quantized_io = QuantizedIO.from_dict(record["boundary"]) if "boundary" in record else QuantizedIO()
        encodings = Encodings.from_dict(read_buffers(record["recipe"], module))
        return Report.from_dict(record["report"]), encodings, quantized_io
    except FileFormatError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"the report inside {source} is not readable: {error}") from error


def _dynamic_shapes(program: ExportedProgram) -> Any:
    """Which dimensions of the inputs are dynamic, in the form ``torch.export`` takes; None when there are none."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    leaves = [_dynamic_sizes(values.get(str(name))) for name in program.graph_signature.user_inputs]
    if not any(leaves):
        return None
    if len(leaves) != program.call_spec.in_spec.num_leaves:
        return None
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return (*args, *kwargs.values())


def _dynamic_sizes(value: Any) -> dict[int, Any] | None:
    if not isinstance(value, Tensor):
        return None
    return {i: Dim.AUTO for i, size in enumerate(value.shape) if type(size) is not int} or None
