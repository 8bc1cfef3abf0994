"""The report on a page: the ops as a table and as a graph, the worst tensors with their histograms."""

from __future__ import annotations

from collections.abc import Sequence

from quant2e.page.model_explorer import ExplorerNode
from quant2e.page.section import DotChart, FlowChart, FlowNode, PageSection, RangeChart
from quant2e.report.chosen_range import ChosenRange
from quant2e.report.tensor_range import TensorRange
from quant2e.report.verdict import Verdict

_DRAWN = 2000
"""Ops up to which a graph is drawn: about 50,000 pixels down."""


def table_of_ops(verdicts: Sequence[Verdict]) -> PageSection:
    """A row for each float op of the captured graph."""
    return PageSection(
        title="Ops",
        headers=("op", "verdict", "reason", "target", "module", "multiply-accumulates", "source"),
        rows=tuple((v.op.name, v.kind, v.reason, v.op.target, v.op.module, v.op.macs, v.op.source) for v in verdicts),
        filters=("verdict", "target"),
    )


def flow_of_ops(verdicts: Sequence[Verdict]) -> PageSection | None:
    """The ops as a graph, coloured by verdict; None where the record does not say what reads what."""
    if not any(v.op.inputs for v in verdicts):
        return None
    if len(verdicts) > _DRAWN:
        told = f"{len(verdicts)} ops are too many to draw: report.to_model_explorer(path) writes them for a viewer"
        return PageSection(title="Graph", lines=(told,))
    known = {v.op.name for v in verdicts}
    inputs = dict.fromkeys(name for v in verdicts for name in v.op.inputs if name not in known)
    nodes = [FlowNode(id=name, label=name, kind="input") for name in inputs]
    nodes += [
        FlowNode(id=v.op.name, label=v.op.name, kind=v.kind, inputs=v.op.inputs, detail=f"{v.kind}: {v.reason}"[:60])
        for v in verdicts
    ]
    return PageSection(title="Graph", charts=(FlowChart(title="the ops and what they read", nodes=tuple(nodes)),))


def table_of_tensors(tensors: Sequence[TensorRange]) -> PageSection | None:
    """The tensors that lose most, each with its histogram; None without any."""
    if not tensors:
        return None
    headers = ("tensor", "SQNR, dB", "smallest", "largest", "range from", "range to", "integers", "clipped")
    charts = [
        RangeChart(
            title=f"{one.name}: {one.sqnr_db:.1f} dB",
            low=one.low,
            high=one.high,
            counts=one.counts,
            chosen=(one.range_low, one.range_high),
        )
        for one in tensors
    ]
    whole = DotChart(
        title="each tensor alone, rounded and clipped",
        unit="SQNR, dB",
        names=tuple(one.name for one in tensors),
        series={"SQNR": tuple(one.sqnr_db for one in tensors)},
    )
    return PageSection(
        title="Worst tensors",
        lines=(
            "Tensors with one scale that lose most to rounding and clipping, from the histograms of calibration",
            "Bars: how many values were seen, on a logarithmic scale. Shaded: what the integers stand for.",
        ),
        headers=headers,
        rows=tuple(
            (t.name, t.sqnr_db, t.low, t.high, t.range_low, t.range_high, t.levels, f"{t.clipped:.2%}") for t in tensors
        ),
        charts=(whole, *charts),
    )


def table_of_ranges(ranges: Sequence[ChosenRange]) -> PageSection | None:
    """The tensors for which several ranges were compared; None without any."""
    if not ranges:
        return None
    return PageSection(
        title="Ranges that were compared",
        headers=("tensor", "best range", "percentile", "what is computed from it, dB"),
        rows=tuple((one.tensor, one.method, one.percentile, one.sqnr_db) for one in ranges),
        filters=("best range",),
    )


def explorer_nodes(verdicts: Sequence[Verdict], tensors: Sequence[TensorRange]) -> list[ExplorerNode]:
    """The ops, and the inputs that they read, as Model Explorer shows them."""
    ranges = {one.tensor: one for one in tensors}
    known = {v.op.name for v in verdicts}
    inputs = dict.fromkeys(name for v in verdicts for name in v.op.inputs if name not in known)
    nodes = [ExplorerNode(name=name, label=name, place="", inputs=(), facts={"kind": "input"}) for name in inputs]
    for v in verdicts:
        facts = {"verdict": v.kind, "reason": v.reason, "target": v.op.target, "source": v.op.source}
        facts |= {"multiply-accumulates": f"{v.op.macs:,}"} if v.op.macs else {}
        facts |= {"range": str(ranges[v.op.name])} if v.op.name in ranges else {}
        said = {key: value for key, value in facts.items() if value}
        label = v.op.target.removeprefix("aten.").partition(".")[0]
        nodes.append(
            ExplorerNode(
                name=v.op.name,
                label=label,
                place=v.op.module,
                inputs=v.op.inputs,
                facts=said,
                overlays={"verdict": v.kind},
            )
        )
    return nodes
