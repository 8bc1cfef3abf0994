"""The pipeline in one call: a model in, a quantized model with its report out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from quant2e.accuracy.output_error import output_sqnr
from quant2e.annotation.quantizer import Quantizer
from quant2e.calibration.calibrate import Progress, batch_count, calibrate
from quant2e.calibration.range_selection import collapsed, select_ranges
from quant2e.convert.convert import convert_pt2e
from quant2e.errors import Quant2eError
from quant2e.graph.captured.calls import Call, positional_inputs
from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.dynamic_shapes import of_graph
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.mutation import own_written_tensors
from quant2e.prepare.prepare import prepare_pt2e
from quant2e.quantized_io import called_with_floats, quantized_io_of, with_quantized_io
from quant2e.quantized_model import QuantizedModel
from quant2e.report.encodings import encodings_of
from quant2e.report.record import RECORD_KEY, record_of

_HOLD_OUT_EVERY = 8
_HOLD_OUT_AT_MOST = 8

_SELECT_RANGES_ON = 2
"""Held-out batches on which candidate ranges are compared; each costs about four forwards."""


class _HoldOut:
    """Hands on most of an iterable and keeps a few batches back: the second one, then every eighth, at most eight.

    When there is only one batch it is handed on and kept.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        if isinstance(data, (Tensor, str, Mapping)):
            raise Quant2eError(
                f"calibration_data is a {type(data).__name__}; give an iterable of batches, or wrap "
                "a single batch in a "
                "list: [batch]"
            )
        self._data = data
        self.kept: list[Any] = []
        self.separate = False

    def __len__(self) -> int:
        total = batch_count(self._data)
        if total is None:
            raise TypeError("the data does not say how many batches it holds")
        return total - len([i for i in range(total) if self._keeps(i)])

    @staticmethod
    def _keeps(index: int) -> bool:
        return index % _HOLD_OUT_EVERY == 1 and index // _HOLD_OUT_EVERY < _HOLD_OUT_AT_MOST

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self._data):
            if self._keeps(index):
                if not self.separate:
                    self.kept.clear()
                    self.separate = True
                self.kept.append(batch)
                continue
            if index == 0:
                self.kept.append(batch)
            yield batch


def quantize(
    model: nn.Module | ExportedProgram | GraphModule,
    example_inputs: Any,
    quantizer: Quantizer,
    calibration_data: Iterable[Any] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    use_reference_representation: bool = False,
    int8_io: bool = False,
    allow_unquantized: bool = False,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Capture, prepare, calibrate, convert; then measure against float.

    ``example_inputs``: positional inputs (a tuple; a single tensor is taken as one), ``kwargs``: keyword inputs.
    ``calibration_data``: any iterable of what the model takes (tensors, tuples, dicts; a DataLoader works); dynamic and
    weight-only quantizers need none. A few of its batches are held out, never calibrated on: candidate ranges are
    compared on them (see `select_ranges`), and they measure the SQNR in the report. ``use_reference_representation``:
    the module computes in integers, see `quant2e.to_integer`. ``int8_io``: it takes and returns integers wherever it
    quantizes its inputs and outputs, with the parameters in ``.quantized_io``; see `quant2e.with_quantized_io`.
    ``allow_unquantized``: accept a result in which no op is quantized. ``progress``: called with the number of batches
    done and the total, where it is known.

    ``model`` and its tensors are left untouched. Raises the errors of each step, and `Quant2eError` when nothing was
    quantized.
    """
    positional = positional_inputs(example_inputs)
    captured = capture(model, positional, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    prepared = prepare_pt2e(captured, quantizer)
    report = record_of(prepared).report
    if report.quantized_ops == 0 and not allow_unquantized:
        raise Quant2eError(
            f"{type(quantizer).__name__} quantized none of the model's {len(report.verdicts)} float ops. Give it a "
            "configuration (set_global, say), or pass allow_unquantized=True if that is what you want.\n" + str(report)
        )
    held_out: list[Any] = [Call(positional, dict(kwargs or {}))]
    measured_on = "the example inputs"
    notes: list[str] = []
    if calibration_data is not None:
        stream = _HoldOut(calibration_data)
        calibrate(prepared, stream, progress=progress)
        held_out = stream.kept
        notes = collapsed(select_ranges(prepared, held_out[:_SELECT_RANGES_ON]))
        kind = "held-out batch" if stream.separate else "calibration batch"
        measured_on = f"{len(held_out)} {kind}{'es' if len(held_out) > 1 else ''}"
    converted = _converted(prepared, use_reference_representation, int8_io)
    record = record_of(converted)
    sqnr = output_sqnr(_bystander(captured), called_with_floats(_bystander(converted)), held_out)
    report = replace(record.report.with_notes(notes), sqnr_db=sqnr, sqnr_source=measured_on)
    converted.meta[RECORD_KEY] = replace(record, report=report)
    example, keywords = _example(converted, positional, dict(kwargs or {}))
    return QuantizedModel(
        module=converted,
        report=report,
        encodings=encodings_of(record, type(quantizer).__name__),
        example_inputs=example,
        example_kwargs=keywords,
        dynamic_shapes=of_graph(dynamic_shapes, model, positional, kwargs or {}),
    )


def _converted(prepared: GraphModule, reference: bool, int8_io: bool) -> GraphModule:
    if not int8_io:
        return convert_pt2e(prepared, reference)
    from quant2e.integer import to_integer

    converted = with_quantized_io(convert_pt2e(prepared))
    return to_integer(converted) if reference else converted


def _example(
    converted: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs as the converted graph takes them."""
    convention = getattr(converted, "inputs", None)
    if convention is None:
        return copy.copy(args), kwargs
    return quantized_io_of(converted).quantize_inputs(convention, args, kwargs)


def _bystander(gm: GraphModule) -> GraphModule:
    """A copy to measure with: running it leaves caches and counters of the original as they are."""
    copied = copy_graph(gm)
    own_written_tensors(copied)
    return copied
