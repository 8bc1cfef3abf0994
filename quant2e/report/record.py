"""GraphRecord: plan, verdicts and encodings, which travel with a graph under ``gm.meta["quant2e"]``.

Everything in it is a value: it survives ``deepcopy``, and no live node is held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule

from quant2e.annotation.plan import Plan
from quant2e.errors import Quant2eError
from quant2e.observers.encodings import Encoding
from quant2e.report.report import Report

RECORD_KEY = "quant2e"


@dataclass(frozen=True, slots=True)
class GraphRecord:
    """``observers``: the submodule that observes each group of the plan;
    ``encodings``: what it became, once converted. ``bodies``: the records of the bodies of control flow in a converted
    graph, by path; ``report`` is of these, too.
    """

    plan: Plan
    observers: tuple[str, ...]
    report: Report
    encodings: tuple[Encoding | None, ...] = field(default=())
    bodies: Mapping[str, GraphRecord] = field(default_factory=dict)


def record_of(gm: GraphModule) -> GraphRecord:
    """The record of a prepared or converted graph. Raises `Quant2eError` when it has none."""
    record = gm.meta.get(RECORD_KEY)
    if not isinstance(record, GraphRecord):
        raise Quant2eError(
            "this graph was not made by quant2e's prepare_pt2e or convert_pt2e (or its meta was dropped): "
            "there is nothing on record about it"
        )
    return record


def report_of(gm: GraphModule) -> Report:
    """The report of a prepared or converted graph: a verdict for every float op of the captured one, sizes and notes.

    It has an SQNR where `quant2e.quantize` measured one. Raises `Quant2eError` for a graph without a record: one that
    was not made here, or was loaded from a file (there `QuantizedModel.report` is the report).
    """
    return record_of(gm).report


def plan_of(gm: GraphModule) -> Plan:
    """The plan of a prepared or converted graph: which points share which numbers. Raises as `report_of` does."""
    return record_of(gm).plan
