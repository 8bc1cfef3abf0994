"""QuantizedModel: a Q/DQ graph with its report, its encodings and what it was captured with; saved and loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from quant2e.errors import Quant2eError
from quant2e.graph.captured.calls import example_call
from quant2e.graph.captured.dynamic_shapes import read_dynamic_shapes
from quant2e.quantized_io import QuantizedIO, quantized_io_of
from quant2e.report.encodings import Encodings, encodings_of
from quant2e.report.record import RECORD_KEY, GraphRecord
from quant2e.report.report import Report
from quant2e.storage.pt2 import Pt2Contents, read_pt2, read_trusted, write_pt2


@dataclass(slots=True, eq=False, repr=False)
class QuantizedModel:
    """A Q/DQ graph with everything known about it.

    ``module``: the graph. ``example_inputs``, ``example_kwargs``, ``dynamic_shapes``: what it was captured with, and
    what saving and lowering need. ``stand_ins``: the example inputs are noise that looks like them, since the file that
    the model was loaded from does not hold them. Calling the object calls the graph; ``repr`` summarises the report.
    """

    module: GraphModule
    report: Report
    encodings: Encodings
    example_inputs: tuple[Any, ...]
    example_kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    stand_ins: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __repr__(self) -> str:
        return self.report.summary(self._title)

    def _repr_html_(self) -> str:
        return self.report.html(self._title)

    @property
    def _title(self) -> str:
        by = f", quantized by {self.encodings.quantizer}" if self.encodings.quantizer else ""
        return f"QuantizedModel{by}"

    @property
    def quantized_io(self) -> QuantizedIO:
        """The inputs and outputs that carry integers, and their parameters."""
        return quantized_io_of(self.module)

    def save(self, path: str | Path, *, with_example_inputs: bool = False) -> None:
        """Write an ExportedProgram with report and encodings to ``path`` (``.pt2``); see `quant2e.save`."""
        save(self, path, with_example_inputs=with_example_inputs)


def save(
    model: QuantizedModel | GraphModule,
    path: str | Path,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    dynamic_shapes: Any = None,
    with_example_inputs: bool = False,
) -> None:
    """Write a quantized model to ``path``; the suffix is ``.pt2``.

    A `QuantizedModel` remembers its example inputs and dynamic shapes; give them for a converted GraphModule. The file
    says what they look like; their data is in it only ``with_example_inputs``. Of the user's files it has names and
    line numbers, neither folders nor text. It appears under ``path`` only when it is complete. Raises `Quant2eError`
    when inputs are missing or do not fit, or the graph cannot be saved, OSError when the file cannot be written;
    ``path`` is then as it was.
    """
    contents = _contents(model, example_inputs, dynamic_shapes)
    write_pt2(path, contents, with_example_inputs=with_example_inputs)


def _contents(
    model: QuantizedModel | GraphModule, example_inputs: tuple[Any, ...] | None, dynamic_shapes: Any
) -> Pt2Contents:
    given = None if example_inputs is None else example_call(example_inputs)
    if isinstance(model, QuantizedModel):
        return Pt2Contents(
            module=model.module,
            report=model.report,
            encodings=model.encodings,
            example_inputs=model.example_inputs if given is None else given.args,
            example_kwargs=model.example_kwargs if given is None else given.kwargs,
            dynamic_shapes=model.dynamic_shapes if dynamic_shapes is None else dynamic_shapes,
        )
    if given is None:
        raise Quant2eError("save(module, path, example_inputs): a GraphModule does not remember its example inputs")
    record = model.meta.get(RECORD_KEY)
    report, encodings = Report(verdicts=()), Encodings("", ())
    if isinstance(record, GraphRecord):
        report, encodings = record.report, encodings_of(record, "") if record.encodings else encodings
    return Pt2Contents(
        module=model,
        report=report,
        encodings=encodings,
        example_inputs=given.args,
        example_kwargs=given.kwargs,
        dynamic_shapes=read_dynamic_shapes(model) if dynamic_shapes is None else dynamic_shapes,
    )


def load(path: str | Path) -> QuantizedModel:
    """Read what `save` wrote; the outputs are bit-identical.

    Nothing in the file is run, imported or called: its graph is built from a schema, of ops in a table and of names
    that are plain identifiers, and conditions on its inputs are interpreted. Ops of other libraries are used when this
    process has registered them. Each record matches the hash that `save` wrote beside it; that finds damage and
    careless edits, not an edit by someone who writes new hashes. A file without hashes, by an older version, is read
    too, and the report says so; so is a program of torch.export of the same ops, with an empty report.
    Raises `FileFormatError` for anything else; `load_trusted_program` reads more, and trusts the file.
    """
    return _model(read_pt2(path))


def load_trusted_program(path: str | Path) -> QuantizedModel:
    """Read a ``.pt2`` file with ``torch.export.load``, which can run code that the file holds.

    Only for files that you trust as you trust a script: pickled objects in them are unpickled, names are resolved, and
    conditions on their inputs are compiled and run. It reads what `load` refuses, custom classes say; the report is
    empty. Raises `FileFormatError` when torch cannot read the file.
    """
    return _model(read_trusted(path))


def _model(contents: Pt2Contents) -> QuantizedModel:
    return QuantizedModel(**{field.name: getattr(contents, field.name) for field in fields(contents)})
