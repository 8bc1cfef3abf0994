"""Alternatives: for each quantizer, and for each list of algorithms that may mend it, a graph that data calibrated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch.fx import GraphModule

from quant2e.accuracy.algorithms.driver import Driver
from quant2e.accuracy.algorithms.ladder import ENOUGH_DB, attempts_of
from quant2e.accuracy.algorithms.registry import Algorithms
from quant2e.accuracy.tuning.space.space import Alternative
from quant2e.annotation.quantizer import Quantizer
from quant2e.calibration.feed import Feed
from quant2e.calibration.held_out import SELECT_RANGES_ON, HeldOutData, calibrate_but_some
from quant2e.calibration.range_selection import select_ranges
from quant2e.calibration.repeated_data import RepeatedData
from quant2e.calibration.statistics import SAMPLES, Statistics, fingerprint, measuring, observers_of
from quant2e.graph.captured.calls import Call
from quant2e.prepare.prepare import prepare_pt2e


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
        by = type(quantizer).__name__
        found.append(Alternative(name, prepared, _calibrated(prepared, found, data, repeated, example), by))
        for mended, (attempts, auto) in mending.items():
            assert repeated is not None
            driver = Driver(captured, quantizer, repeated, ENOUGH_DB if auto else math.inf)
            result = driver.run(prepare_pt2e(captured, quantizer), attempts, None)
            label = mended_name(name, mended, quantizers)
            found.append(Alternative(label, result.prepared, result.held_out, by, result.steps))
    return tuple(found)


def mended_name(quantizer: str, algorithms: str, quantizers: Mapping[str, Quantizer]) -> str:
    """How the alternative is called that a list of algorithms makes under one of the quantizers."""
    return algorithms if len(quantizers) == 1 else f"{quantizer}, {algorithms}"


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
