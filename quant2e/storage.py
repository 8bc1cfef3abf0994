"""Quantized models on disk: an ExportedProgram (``.pt2``) that carries its report and recipe.

The file is one that ``torch.export.load`` reads, in any process where torch's own q/dq ops are registered
(``import torch.ao.quantization.fx._decomposed``). Importing this module registers them, through `quant2e.dialect`;
`load` gives report and recipe back, and refuses files that could run code.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from quant2e.archive_check import check_archive
from quant2e.atomic import atomic_file
from quant2e.boundary import BOUNDARY, Boundary, boundary_of
from quant2e.capture import as_graph_module
from quant2e.errors import FileFormatError, Quant2eError, user_frame
from quant2e.inputs import distinct
from quant2e.ledger import LEDGER, Ledger
from quant2e.model import QuantizedModel
from quant2e.packing import pack_recipe, unpack_recipe
from quant2e.recipe import Recipe, recipe_of
from quant2e.report import Report

RECORD = "quant2e.json"
"""Name of the extra file that holds report, recipe, and the parameters of integer inputs and outputs."""

RECORD_FORMAT = 1


def save(
    model: QuantizedModel | GraphModule,
    path: str | Path,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> None:
    """Write a quantized model to ``path``; the suffix is ``.pt2``.

    A `QuantizedModel` remembers its example inputs and dynamic shapes; give them for a converted GraphModule. The file
    appears under ``path`` only when it is complete. Raises `Quant2eError` when inputs are missing or the graph cannot
    be exported, OSError when the file cannot be written; ``path`` is then as it was.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise Quant2eError(f"'{target.name}': the suffix of an exported program is .pt2")
    module, args, kwargs, shapes, record = _parts(model, example_inputs, dynamic_shapes)
    try:
        args, kwargs = distinct(args, kwargs)
        program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
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


def _parts(
    model: QuantizedModel | GraphModule, example_inputs: tuple[Any, ...] | None, dynamic_shapes: Any
) -> tuple[GraphModule, tuple[Any, ...], dict[str, Any], Any, dict[str, Any]]:
    if isinstance(model, QuantizedModel):
        args = model.example_inputs if example_inputs is None else tuple(example_inputs)
        kwargs = model.example_kwargs if example_inputs is None else {}
        shapes = model.dynamic_shapes if dynamic_shapes is None else dynamic_shapes
        report, recipe = model.report, model.recipe
        module = model.module
    else:
        if example_inputs is None:
            raise Quant2eError("save(module, path, example_inputs): a GraphModule does not remember its example inputs")
        module, args, kwargs, shapes = model, tuple(example_inputs), {}, dynamic_shapes
        ledger = module.meta.get(LEDGER)
        report, recipe = Report(verdicts=()), Recipe("", ())
        if isinstance(ledger, Ledger):
            report, recipe = ledger.report, recipe_of(ledger, "")
    record = {"format": RECORD_FORMAT, "report": report.as_dict(), "recipe": pack_recipe(recipe.as_dict())}
    if boundary := boundary_of(module):
        record["boundary"] = boundary.as_dict()
    return module, args, kwargs, shapes, record


def load(path: str | Path) -> QuantizedModel:
    """Read what `save` wrote; the outputs are bit-identical.

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
    report, recipe, boundary = _record(source, extra[RECORD])
    module = as_graph_module(program)
    if boundary:
        module.meta[BOUNDARY] = boundary
    return QuantizedModel(
        module=module,
        report=report,
        recipe=recipe,
        example_inputs=tuple(args),
        example_kwargs=dict(kwargs),
        dynamic_shapes=_dynamic_shapes(program),
    )


def _record(source: Path, text: str | bytes) -> tuple[Report, Recipe, Boundary]:
    if not text:
        return Report(verdicts=()), Recipe("", ()), Boundary()
    try:
        record = json.loads(text)
        if record["format"] != RECORD_FORMAT:
            raise FileFormatError(
                f"{source} has a record of format {record['format']!r}; this version reads format {RECORD_FORMAT}"
            )
        boundary = Boundary.from_dict(record["boundary"]) if "boundary" in record else Boundary()
        return Report.from_dict(record["report"]), Recipe.from_dict(unpack_recipe(record["recipe"])), boundary
    except (json.JSONDecodeError, KeyError, TypeError) as error:
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
