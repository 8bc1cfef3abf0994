"""Candidates: the quantized model of a mix, converted for real from what was calibrated once."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule

from quant2e.accuracy.compare import compare
from quant2e.accuracy.output_loss import converted_sqnr
from quant2e.accuracy.tuning.space.mixture import prepared_for
from quant2e.accuracy.tuning.space.space import Mix, Space
from quant2e.calibration.range_selection import ranges_of
from quant2e.convert.convert import converted_graph
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import independent_copy
from quant2e.quantized_model import QuantizedModel
from quant2e.report.encodings import encodings_of
from quant2e.report.record import RECORD_KEY, record_of
from quant2e.report.report import BAD_SQNR_DB


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Makes the models of choices.

    ``captured``: the float graph; ``example``, ``dynamic_shapes``: what it was captured with; ``notes``: what a report
    says of the data.
    """

    captured: GraphModule
    space: Space
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
        known = self.space.families[mix.family].by_name
        by = ", ".join(dict.fromkeys(known[pick].by for pick in mix.picks if pick in known))
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
        steps = tuple(step for alternative in used for step in alternative.steps)
        report = replace(model.report, ranges=ranges, algorithms=steps)
        sqnr, place = converted_sqnr(self.captured, used[0].prepared, model.module, held_out.calls)
        source = f"{held_out.source}, {place}" if place else held_out.source
        report = replace(report, sqnr_db=sqnr, sqnr_source=source).with_notes(self.notes)
        if not sqnr >= BAD_SQNR_DB:
            places = compare(used[0].prepared, model.module, held_out.calls[:1]).worst_places()
            report = replace(report, worst_places=tuple(f"{place}: {place.advice}" for place in places))
        model.module.meta[RECORD_KEY] = replace(record_of(model.module), report=report)
        return replace(model, report=report)
