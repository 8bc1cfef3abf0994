"""Candidates: the quantized model of a mix, converted for real from what was calibrated once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule

from quant2e.accuracy.compare import compare
from quant2e.accuracy.output_loss import converted_sqnr
from quant2e.accuracy.tuning.space.mixture import prepared_for
from quant2e.accuracy.tuning.space.space import Alternative, Mix, Space
from quant2e.annotation.quantizer import Quantizer
from quant2e.calibration.feed import Feed
from quant2e.calibration.held_out import SELECT_RANGES_ON, HeldOutData, calibrate_but_some
from quant2e.calibration.range_selection import ranges_of, select_ranges
from quant2e.calibration.repeated_data import RepeatedData
from quant2e.calibration.statistics import SAMPLES, Statistics, fingerprint, measuring, observers_of
from quant2e.convert.convert import converted_graph
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import independent_copy
from quant2e.prepare.prepare import prepare_pt2e
from quant2e.quantized_model import QuantizedModel
from quant2e.report.encodings import encodings_of
from quant2e.report.record import RECORD_KEY, record_of
from quant2e.report.report import BAD_SQNR_DB


def alternatives_of(
    captured: GraphModule, quantizers: Mapping[str, Quantizer], data: Feed | None, example: Call
) -> tuple[Alternative, ...]:
    """Prepare and calibrate one graph for each quantizer.

    Quantizers that observe the same tensors in the same way, and differ in bits or methods, share one calibration.
    ``data``: None for quantizers that need none; losses are then measured on ``example``. Raises as `RepeatedData` does
    where several quantizers need data that can be read only once.
    """
    found: list[Alternative] = []
    calibrated: dict[str, Alternative] = {}
    repeated = RepeatedData(data, example) if len(quantizers) > 1 else None
    for name, quantizer in quantizers.items():
        prepared = prepare_pt2e(captured, quantizer)
        held_out = HeldOutData([example], "the example inputs")
        if data is not None and observers_of(prepared):
            key = fingerprint(prepared)
            same = calibrated.get(key)
            if same is None or len(measuring(prepared)) != len(observers_of(prepared)):
                held_out = calibrate_but_some(prepared, data) if repeated is None else repeated.calibrate(prepared)
            else:
                Statistics.of(same.prepared).restore(prepared)
                prepared.meta.update({k: v for k, v in same.prepared.meta.items() if k == SAMPLES})
                choices = select_ranges(prepared, same.held_out.calls[:SELECT_RANGES_ON])
                held_out = same.held_out._replace(choices=choices)
            calibrated.setdefault(key, Alternative(name, prepared, held_out))
        found.append(Alternative(name, prepared, held_out))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Makes the models of choices.

    ``captured``: the float graph; ``quantizers``: their names as encodings have them, by alternative; ``example``,
    ``dynamic_shapes``: what the graph was captured with; ``notes``: what a report says of the data.
    """

    captured: GraphModule
    space: Space
    quantizers: Mapping[str, str]
    example: Call
    dynamic_shapes: Any = None
    notes: tuple[str, ...] = ()

    def float_model(self) -> GraphModule:
        """The float graph, to be evaluated."""
        return independent_copy(self.captured)

    def model(self, mix: Mix) -> QuantizedModel:
        """The quantized model of a mix; the same, bit for bit, each time."""
        converted = converted_graph(prepared_for(self.space, mix))
        record = record_of(converted)
        used = (name for name in dict.fromkeys(mix.picks) if name in self.quantizers)
        by = ", ".join(dict.fromkeys(self.quantizers[name] for name in used))
        return QuantizedModel(
            module=converted,
            report=record.report,
            encodings=encodings_of(record, by),
            example_inputs=copy.copy(self.example.args),
            example_kwargs=dict(self.example.kwargs),
            dynamic_shapes=self.dynamic_shapes,
        )

    def measured(self, model: QuantizedModel, mix: Mix) -> QuantizedModel:
        """The same with its SQNR against float, on held-out data, in the report; where it is bad, with the places."""
        family = self.space.families[mix.family]
        used = [a for a in family.alternatives if a.name in mix.picks] or list(family.alternatives[:1])
        held_out = used[0].held_out
        ranges = ranges_of([one for alternative in used for one in alternative.held_out.choices])
        report = replace(model.report, ranges=ranges)
        sqnr, place = converted_sqnr(self.captured, used[0].prepared, model.module, held_out.calls)
        source = f"{held_out.source}, {place}" if place else held_out.source
        report = replace(report, sqnr_db=sqnr, sqnr_source=source).with_notes(self.notes)
        if not sqnr >= BAD_SQNR_DB:
            places = compare(used[0].prepared, model.module, held_out.calls[:1]).worst_places()
            report = replace(report, worst_places=tuple(f"{place}: {place.advice}" for place in places))
        model.module.meta[RECORD_KEY] = replace(record_of(model.module), report=report)
        return replace(model, report=report)
