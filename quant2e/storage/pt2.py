"""Quantized models on disk: an ExportedProgram (``.pt2``) that carries its report and encodings.

The file is one that ``torch.export.load`` reads, in any process where torch's own q/dq ops are registered
(``import torch.ao.quantization.fx._decomposed``). Importing this module registers them, through
`quant2e.graph.qdq_ops`; `read_pt2` gives report and encodings back, and refuses files that could run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from quant2e.errors import FileFormatError, Quant2eError
from quant2e.files import atomic_file
from quant2e.graph.captured.capture import as_graph_module
from quant2e.graph.captured.inputs import inputs_of
from quant2e.isolation import tracing
from quant2e.quantized_io import QUANTIZED_IO
from quant2e.report.encodings import Encodings
from quant2e.report.report import Report
from quant2e.storage.archive_check import check_archive
from quant2e.storage.manifest import with_manifest
from quant2e.storage.record import RECORD, read_example_inputs, read_record, read_results, record_text
from quant2e.storage.writer.archive import write_records
from quant2e.storage.writer.program import program_records
from quant2e.storage.writer.savable import savable


@dataclass(frozen=True, slots=True, eq=False)
class Pt2Contents:
    """What a ``.pt2`` file holds: the graph, what is on record about it, and what it was captured with."""

    module: GraphModule
    report: Report
    encodings: Encodings
    example_inputs: tuple[Any, ...]
    example_kwargs: dict[str, Any]
    dynamic_shapes: Any
    stand_ins: bool = False
    """Whether the example inputs only look like those that the model was captured with."""


@tracing()
def write_pt2(path: str | Path, contents: Pt2Contents, *, with_example_inputs: bool = False) -> None:
    """Write ``contents`` to ``path``; the suffix is ``.pt2``. Example inputs are described, or kept when asked for.

    The file appears under ``path`` only when it is complete. Raises `Quant2eError` when the graph cannot be saved or
    does not fit the example inputs, OSError when the file cannot be written; ``path`` is then as it was.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise Quant2eError(f"'{target.name}': the suffix of an exported program is .pt2")
    args, kwargs = contents.example_inputs, contents.example_kwargs
    module = savable(contents.module, args, kwargs, contents.dynamic_shapes)
    record = record_text(
        contents.report, contents.encodings, module, inputs_of(module).flat(args, kwargs), with_data=with_example_inputs
    )
    with atomic_file(target) as part:
        with part.open("wb") as file:
            write_records(file, with_manifest([*program_records(module), (f"extra/{RECORD}", record)]))
        try:
            check_archive(part)
        except FileFormatError as error:
            raise Quant2eError(f"this program could be saved, but not loaded again: {error}") from error


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
    try:
        record = read_record(extra[RECORD])
        args, kwargs, stand_ins = _example_inputs(program, record)
        if "example_inputs" in record:
            program._example_inputs = (args, kwargs)  # torch checks the conditions on inputs only where it has some
        module = as_graph_module(program)
        report, encodings, quantized_io = read_results(record, module)
    except FileFormatError as error:
        raise FileFormatError(f"{source} is damaged: {error}") from error
    if quantized_io:
        module.meta[QUANTIZED_IO] = quantized_io
    return Pt2Contents(
        module=module,
        report=report,
        encodings=encodings,
        example_inputs=args,
        example_kwargs=kwargs,
        dynamic_shapes=_dynamic_shapes(program),
        stand_ins=stand_ins,
    )


def _example_inputs(
    program: ExportedProgram, record: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    found = read_example_inputs(record)
    if found is None:
        args, kwargs = program.example_inputs or ((), {})
        return tuple(args), dict(kwargs), False
    leaves, stand_ins = found
    spec = program.call_spec.in_spec
    if spec.num_leaves != len(leaves):
        raise FileFormatError(f"it describes {len(leaves)} example inputs, and its graph takes {spec.num_leaves}")
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return tuple(args), dict(kwargs), stand_ins


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
