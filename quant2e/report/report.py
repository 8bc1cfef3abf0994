"""The report: a verdict for every float op, and what quantization cost.

One verdict per float op of the captured graph: quantized, and by which rule; or float, and why. Nothing is left out,
and what did not happen (ignored annotations, flushed tensors, masked values) is listed as notes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from quant2e.documents.schema import LATER, from_record
from quant2e.graph.control_flow import prefixed
from quant2e.page.model_explorer import write_explorer_graph, write_explorer_overlay
from quant2e.page.render import ShownOnAPage
from quant2e.page.section import PageSection
from quant2e.report.algorithm_step import AlgorithmStep, lines_of_steps
from quant2e.report.chosen_range import ChosenRange
from quant2e.report.html import html_table
from quant2e.report.plain_data import plain_data
from quant2e.report.report_page import explorer_nodes, flow_of_ops, table_of_ops, table_of_ranges, table_of_tensors
from quant2e.report.summary import NOTES_SHOWN, summary
from quant2e.report.tensor_range import MOST_TENSORS, TensorRange
from quant2e.report.verdict import DYNAMIC, FLOAT, FOLDED, KINDS, STATIC, WEIGHT_ONLY, Verdict
from quant2e.stored_tensor import StoredTensor

__all__ = ["DYNAMIC", "FLOAT", "FOLDED", "KINDS", "STATIC", "WEIGHT_ONLY", "Verdict"]  # of a report's rows; and below:
__all__ += ["BAD_SQNR_DB", "ChosenRange", "Report", "tensor_bytes", "with_body"]


BAD_SQNR_DB = 20.0
"""SQNR of the output, or of what is computed from one tensor, below which a report says that it is bad."""


@dataclass(frozen=True, slots=True, repr=False)
class Report(ShownOnAPage):
    """Verdicts, sizes and accuracy of one quantization. ``str(report)`` is all of it, ``repr(report)`` a summary.

    ``float_bytes``/``quantized_bytes``: tensors that the float and the quantized graph hold. ``sqnr_db``: signal to
    quantization noise of the output against float, in dB, on ``sqnr_source``; None when it was not measured.
    ``losses``: tensors whose values integers turn into zero or clip, and what helps, the worst first; then biases that
    move by more than one step of the result. ``ranges``: tensors for which several ranges were compared, those that
    lose most first. ``worst_places``: where the error of a bad output comes from, and what to do about it, a sentence
    each. ``algorithms``: the algorithms that were to mend accuracy, in the order in which they ran, and what became of
    each. ``tensors``: a dozen at most, those that lose most to rounding and clipping, the worst first.
    ``float_weight_reads``/``weight_reads``: bytes of weights that products read in one call, of a decoder in one step
    (see `quant2e.report.weight_reads`); None before conversion.
    """

    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()
    float_bytes: int = 0
    quantized_bytes: int | None = None
    sqnr_db: float | None = None
    sqnr_source: str = ""
    losses: tuple[str, ...] = field(default=(), metadata=LATER)
    ranges: tuple[ChosenRange, ...] = field(default=(), metadata=LATER)
    worst_places: tuple[str, ...] = field(default=(), metadata=LATER)
    algorithms: tuple[AlgorithmStep, ...] = field(default=(), metadata=LATER)
    tensors: tuple[TensorRange, ...] = field(default=(), metadata=LATER)
    float_weight_reads: int = field(default=0, metadata=LATER)
    weight_reads: int | None = field(default=None, metadata=LATER)

    @property
    def int8_mac_share(self) -> float:
        """Share of the multiply-accumulates that run on quantized activations and weights; 0 when there are none."""
        total = sum(v.op.macs for v in self.verdicts)
        return sum(v.op.macs for v in self.verdicts if v.kind in (STATIC, DYNAMIC)) / total if total else 0.0

    @property
    def quantized_ops(self) -> int:
        """How many float ops were quantized."""
        return sum(v.quantized for v in self.verdicts)

    def of(self, name: str) -> Verdict:
        """The verdict of the op of that node name. Raises KeyError when the captured graph had no such float op."""
        for verdict in self.verdicts:
            if verdict.op.name == name:
                return verdict
        raise KeyError(name)

    def with_float(self, reasons: Mapping[str, str]) -> Report:
        """A copy in which the quantized ops that ``reasons`` names are float, for the reason that it gives."""
        verdicts = tuple(
            replace(v, kind=FLOAT, reason=reasons[v.op.name]) if v.quantized and v.op.name in reasons else v
            for v in self.verdicts
        )
        return replace(self, verdicts=verdicts)

    def with_notes(self, notes: Iterable[str]) -> Report:
        """A copy with further notes, each once."""
        return replace(self, notes=tuple(dict.fromkeys((*self.notes, *notes))))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `from_dict` is its inverse."""
        return {**plain_data(self), "int8_mac_share": self.int8_mac_share}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `as_dict` described. Raises `FileFormatError` for anything else."""
        return from_record(cls, data, "the report", besides=("int8_mac_share",))

    def summary(self, title: str) -> str:
        """``title`` with the counts of verdicts, then shares, sizes, accuracy and the first notes, a line each."""
        first, *others = self._headline()
        return summary([f"{title}: {first}", *others, *self._bad_ranges()[:NOTES_SHOWN]], (*self.losses, *self.notes))

    def html(self, title: str) -> str:
        """`summary`, and below it a table of the verdicts."""
        rows = [(v.op.name, v.kind, v.reason, v.op.module, v.op.macs) for v in self.verdicts]
        return html_table(("op", "verdict", "reason", "module", "multiply-accumulates"), rows, self.summary(title))

    def page_sections(self) -> tuple[PageSection, ...]:
        """What a page shows of it: the whole, a table of the ops, their graph, and the worst tensors."""
        said = (*(f"loss: {loss}" for loss in self.losses), *self._bad_ranges(), *(f"note: {n}" for n in self.notes))
        changes = (f"{step.name}: {change}" for step in self.algorithms for change in step.changes)
        whole = PageSection(title="Summary", lines=(*self._headline(), *changes, *said), data=self.as_dict())
        tensors = (table_of_tensors(self.tensors), table_of_ranges(self.ranges))
        parts = (table_of_ops(self.verdicts), flow_of_ops(self.verdicts), *tensors)
        return (whole, *(part for part in parts if part is not None))

    def to_model_explorer(self, path: str | os.PathLike[str]) -> None:
        """Write the graph of the ops for Google's Model Explorer, and beside it, for laying over it, the verdicts.

        ``model.json`` becomes ``model.json`` and ``model_verdicts.json``; ``model-explorer model.json`` opens it.
        Raises OSError when a file cannot be written.
        """
        nodes, target = explorer_nodes(self.verdicts, self.tensors), Path(path)
        write_explorer_graph(target, target.stem, nodes)
        write_explorer_overlay(
            target.with_name(f"{target.stem}_verdicts{target.suffix}"), target.stem, "verdict", nodes
        )

    def __repr__(self) -> str:
        return self.summary("Report")

    def _repr_html_(self) -> str:
        return self.html("Report")

    def _headline(self) -> list[str]:
        counts = Counter(v.kind for v in self.verdicts)
        lines = self._warning()
        lines += [f"{len(self.verdicts)} float ops: " + ", ".join(f"{counts[k]} {k}" for k in KINDS if counts[k])]
        weight_only = sum(v.op.macs for v in self.verdicts if v.kind == WEIGHT_ONLY)
        if not weight_only or self.int8_mac_share:
            lines.append(f"multiply-accumulates on int8: {self.int8_mac_share:.1%}")
        if weight_only and self.weight_reads is not None and self.float_weight_reads:
            share = self.weight_reads / self.float_weight_reads
            lines.append(
                f"weight-only: products compute in float, on fewer bytes; weights read by a call: "
                f"{self.float_weight_reads:,} -> {self.weight_reads:,} bytes ({share:.3f} x)"
            )
        if self.quantized_bytes is not None:
            ratio = self.quantized_bytes / self.float_bytes if self.float_bytes else 1.0
            lines.append(f"tensors: {self.float_bytes:,} -> {self.quantized_bytes:,} bytes ({ratio:.3f} x)")
        if self.sqnr_db is not None:
            lines.append(f"SQNR against float: {self.sqnr_db:.1f} dB on {self.sqnr_source}")
        return [*lines, *lines_of_steps(self.algorithms)]

    def _warning(self) -> list[str]:
        """What comes first where the output is bad: how bad, and where it comes from."""
        if self.sqnr_db is None or self.sqnr_db >= BAD_SQNR_DB:
            return []
        noise = min(10.0 ** (-self.sqnr_db / 10.0), 1.0)
        where = ", and most of it appears at" if self.worst_places else ""
        first = f"the output is bad: {noise:.0%} of its power is noise (SQNR {self.sqnr_db:.1f} dB){where}"
        return [first, *self.worst_places]

    def _bad_ranges(self) -> list[str]:
        return [f"range: {one}" for one in self.ranges if one.sqnr_db < BAD_SQNR_DB]

    def __str__(self) -> str:
        lines = [*self._headline(), *(f"loss: {loss}" for loss in self.losses), *self._bad_ranges()]
        lines += [f"{step.name}: {change}" for step in self.algorithms for change in step.changes]
        width = max((len(v.op.name) for v in self.verdicts), default=0)
        for v in self.verdicts:
            place = f"  [{v.op.module}]" if v.op.module else ""
            lines.append(f"  {v.op.name:<{width}}  {v.kind:<11}  {v.reason}{place}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def with_body(report: Report, path: str, body: Report) -> Report:
    """``report`` with what happened in the body of control flow at ``path``: verdicts by name, losses and notes."""
    verdicts = {v.op.name: v for v in report.verdicts}
    for v in body.verdicts:
        name = prefixed(path, v.op.name)
        verdicts[name] = replace(
            v, op=replace(v.op, name=name, inputs=tuple(prefixed(path, one) for one in v.op.inputs))
        )
    losses = (*report.losses, *(f"{path}: {loss}" for loss in body.losses))
    inside = (replace(one, tensor=prefixed(path, one.tensor)) for one in body.tensors)
    tensors = sorted((*report.tensors, *inside), key=lambda one: one.sqnr_db)[:MOST_TENSORS]
    merged = replace(
        report, verdicts=tuple(verdicts.values()), losses=tuple(dict.fromkeys(losses)), tensors=tuple(tensors)
    )
    return merged.with_notes(f"{path}: {note}" for note in body.notes)


def tensor_bytes(gm: GraphModule) -> int:
    """Bytes of all parameters and buffers of a module, each storage once; of those in files, what memory would take."""
    seen: dict[tuple[int, int], int] = {}
    tensors: list[torch.Tensor] = [*gm.parameters(), *gm.buffers()]
    for tensor in tensors:
        place = id(tensor) if isinstance(tensor, StoredTensor) else tensor.data_ptr()
        seen[(place, tensor.numel())] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
