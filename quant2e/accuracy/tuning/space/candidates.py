"""Candidates: the quantized model of a mix, converted for real from what was calibrated once."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule

from quant2e.accuracy.algorithms.driver import Driver
from quant2e.accuracy.algorithms.ladder import ENOUGH_DB, attempts_of
from quant2e.accuracy.algorithms.registry import Algorithms
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
    captured: GraphModule,
    quantizers: Mapping[str, Quantizer],
    data: Feed | None,
    example: Call,
    algorithms: Mapping[str, Algorithms] | None = None,
) -> tuple[Alternative, ...]:
    """Prepare and calibrate one graph for each quantizer, and one more for each list of ``algorithms``, which mend it.

    Quantizers that observe the same tensors in the same way, and differ in bits or methods, share one calibration.
    ``data``: None for quantizers that need none; losses are then measured on ``example``. Raises as `RepeatedData` does
    where data is needed several times and can be read only once.
    """
    found: list[Alternative] = []
    mending = {name: (attempts_of(asked), asked == "auto") for name, asked in (algorithms or {}).items()}
    repeated = RepeatedData(data, example) if len(quantizers) > 1 or mending else None
    for name, quantizer in quantizers.items():
        prepared = prepare_pt2e(captured, quantizer)
        found.append(Alternative(name, prepared, _calibrated(prepared, found, data, repeated, example)))
        for mended, (attempts, auto) in mending.items():
            assert repeated is not None
            driver = Driver(captured, quantizer, repeated, ENOUGH_DB if auto else math.inf)
            result = driver.run(prepare_pt2e(captured, quantizer), attempts, None)
            whole = name if len(quantizers) == 1 else f"{name}, {mended}"
            label = mended if whole == name else whole
            found.append(Alternative(label, result.prepared, result.held_out, tuple(result.steps)))
    return tuple(found)


def _calibrated(
    prepared: GraphModule,
    before: Sequence[Alternative],
    data: Feed | None,
    repeated: RepeatedData | None,
    example: Call,
) -> HeldOutData:
    """Calibrate ``prepared`` in place, or give it the statistics of one ``before`` it that observes the same."""
    observers = observers_of(prepared)
    if data is None or not observers:
        return HeldOutData([example], "the example inputs")
    if len(measuring(prepared)) == len(observers):
        key = fingerprint(prepared)
        same = next((one for one in before if not one.steps and fingerprint(one.prepared) == key), None)
        if same is not None:
            Statistics.of(same.prepared).restore(prepared)
            prepared.meta.update({k: v for k, v in same.prepared.meta.items() if k == SAMPLES})
            choices = select_ranges(prepared, same.held_out.calls[:SELECT_RANGES_ON])
            return same.held_out._replace(choices=choices)
    return calibrate_but_some(prepared, data) if repeated is None else repeated.calibrate(prepared)


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
