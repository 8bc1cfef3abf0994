"""Quantized models on disk: an ExportedProgram (``.pt2``) that carries its report and encodings.

The file is one that ``torch.export.load`` reads, in any process where torch's own q/dq ops are registered
(``import torch.ao.quantization.fx._decomposed``). Importing this module registers them, through
`quant2e.graph.qdq_ops`; `read_pt2` gives report and encodings back, by the strict reader in
`quant2e.storage.reader`, which runs nothing of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
from quant2e.storage.compact import restore_constants, with_compact_constants
from quant2e.storage.file import FileContents, read_file
from quant2e.storage.manifest import with_manifest
from quant2e.storage.record import HASHED_FORMATS, RECORD, read_example_inputs, read_record, read_results, record_text
from quant2e.storage.writer.archive import write_records
from quant2e.storage.writer.program import program_records
from quant2e.storage.writer.savable import savable

NOT_HASHED = (
    "the file carries no hashes: quant2e did not write it, or an older version did, and edits of it show nowhere"
)
"""Note in the report of a file that cannot say whether it is as it was written."""


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
            program = program_records(with_compact_constants(module))
            write_records(file, with_manifest([*program, (f"extra/{RECORD}", record)]))
        try:
            _forget_tensors(read_pt2(part, mapped=True).module)
        except FileFormatError as error:
            raise Quant2eError(f"this program could be saved, but not loaded again: {error}") from error


def _forget_tensors(module: GraphModule) -> None:
    """Let go of the tensors of a graph that nobody needs any more: it refers to itself, so it stays for a while."""
    for owner in module.modules():
        owner._parameters.clear()
        owner._buffers.clear()


@tracing()
def read_pt2(path: str | Path, *, mapped: bool = False) -> Pt2Contents:
    """Read what `write_pt2` wrote, or another program of the ops that it writes; see `quant2e.load`.

    ``mapped``: as for `read_file`.
    """
    source = Path(path)
    contents = read_file(source, mapped=mapped)
    program = contents.program
    try:
        record = read_record(bytes(contents.extra.get(RECORD, b"")))
        if record.get("format") in HASHED_FORMATS and not contents.hashed:
            raise FileFormatError("it has no manifest, and files of its format have one")
        report, encodings, quantized_io = read_results(record, program.module)
        args, kwargs, stand_ins = _example_inputs(contents, record)
    except FileFormatError as error:
        raise FileFormatError(f"{source} is damaged: {error}") from error
    if quantized_io:
        program.module.meta[QUANTIZED_IO] = quantized_io
    return Pt2Contents(
        module=program.module,
        report=report if contents.hashed else report.with_notes([NOT_HASHED]),
        encodings=encodings,
        example_inputs=args,
        example_kwargs=kwargs,
        dynamic_shapes=program.dynamic_shapes,
        stand_ins=stand_ins,
    )


def _example_inputs(contents: FileContents, record: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    found = read_example_inputs(record)
    if found is None:
        args, kwargs = contents.example_inputs or ((), {})
        return args, kwargs, False
    leaves, stand_ins = found
    spec = contents.program.convention.inputs
    if spec.num_leaves != len(leaves):
        raise FileFormatError(f"it describes {len(leaves)} example inputs, and its graph takes {spec.num_leaves}")
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs, stand_ins


@tracing()
def read_trusted(path: str | Path) -> Pt2Contents:
    """Read any program with torch's own loader, which can run code of the file; see `quant2e.load_trusted_program`."""
    try:
        program = torch.export.load(path)
        module = as_graph_module(program)
        restore_constants(module)
    except Exception as error:
        raise FileFormatError(f"{path} cannot be read as an exported program: {error}") from error
    args, kwargs = program.example_inputs or ((), {})
    return Pt2Contents(
        module=module,
        report=Report(verdicts=()),
        encodings=Encodings("", ()),
        example_inputs=tuple(args),
        example_kwargs=dict(kwargs),
        dynamic_shapes=None,
    )
