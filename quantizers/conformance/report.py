"""Report of a conformance check, as data and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quant2e.report.html import html_table
from quant2e.report.plain_data import plain_data
from quant2e.report.summary import summary
from quantizers.conformance.program import Program

KINDS: Mapping[str, str] = {
    "raises": "a stage of the flow raised an error",
    "malformed annotation": "an annotation or a spec that cannot be read",
    "not an operand": "a spec on what is not an operand of its node",
    "another graph": "an annotation or a reference with a node of another graph",
    "dangling share": "a reference to a point that has no spec",
    "cyclic share": "shared specs that refer to each other in a circle",
    "unresolved": "annotations that no plan satisfies",
    "integer tensor": "a spec on an integer or boolean tensor",
    "mask": "a spec on a mask, or on positions computed from integers",
    "wrong axis": "scales along an axis over which the op sums up, or that the tensor does not have",
    "bad range": "an integer range that does not fit its dtype, or leaves out zero",
    "observer": "an observer that measures for other numbers than its spec says",
    "shared across": "one scale on both sides of an op that changes the range of its values",
    "mismatched scales": "different scales on both sides of an op that only moves integers",
    "bias scale": "an integer bias whose scale is not that of the accumulator",
    "isolated": (
        "an op that is quantized on some sides only, so that it computes in float between quantize and dequantize"
    ),
    "requantized": "a tensor that is quantized twice, with different numbers, between an op and its reader",
    "never reached": "a rule that applied to no graph",
    "not generated": "a rule for whose ops no graph could be written",
    "sqnr": "results too far from float",
    "integer reference": "no integer form, or one that disagrees with the quantized graph",
    "not deterministic": "other annotations, or other numbers, for the same graph",
    "graph changed": "annotate() or validate() changed the graph",
    "result changed": "transform_for_annotation() changed the float result",
    "model changed": "parameters, buffers or inputs of the model are not as they were",
    "annotation changed": "an annotation that another quantizer had made was changed or removed",
}
"""Kind of finding → what it means."""

WARNINGS = frozenset({"not generated"})
"""Kinds that do not fail a check."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a quantizer.

    ``kind``: one of `KINDS`. ``rule``: what annotated the node, where it says so. ``node``: the op, by its node name.
    ``op``: its ATen target. ``reproducer``: a small program that shows it; ``reproducer.module()`` runs it.
    """

    kind: str
    message: str
    rule: str = ""
    node: str = ""
    op: str = ""
    reproducer: Program | None = None
    warning: bool = False

    @property
    def graph(self) -> str:
        """The reproducing graph as text; empty for what belongs to no graph."""
        return "" if self.reproducer is None else str(self.reproducer)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; the reproducer is the text of its graph."""
        names = ("kind", "message", "rule", "node", "op", "graph", "warning")
        return {name: getattr(self, name) for name in names}

    @property
    def key(self) -> tuple[str, str, str]:
        """Findings with equal keys are one defect."""
        return self.kind, self.rule, self.op

    def of(self, program: Program) -> Finding:
        """The same, shown by ``program``."""
        return replace(self, reproducer=program)

    def __str__(self) -> str:
        at = f" at '{self.node}' ({self.op})" if self.node else ""
        by = f" [rule {self.rule}]" if self.rule else ""
        text = f"{'warning: ' * self.warning}{self.kind}{at}{by}: {self.message}"
        return text + "".join(f"\n    {line}" for line in self.graph.splitlines())


@dataclass(frozen=True, slots=True, repr=False)
class Conformance:
    """``findings``, errors first. ``examples``: graphs that went through the flow.

    ``reached``: rule → how many it applied to. ``complete``: the time limit did not cut the check short.
    ``seed``: gives the same graphs again.
    """

    quantizer: str
    findings: tuple[Finding, ...]
    examples: int
    reached: Mapping[str, int]
    seed: int
    complete: bool
    notes: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are no warnings."""
        return tuple(f for f in self.findings if not f.warning)

    @property
    def passed(self) -> bool:
        """Whether there are no errors, and at least one graph was examined."""
        return not self.errors and self.examples > 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        findings = [finding.as_dict() for finding in self.findings]
        rest = {name: plain_data(getattr(self, name)) for name in ("examples", "reached", "seed", "complete", "notes")}
        return {"quantizer": self.quantizer, "passed": self.passed, "findings": findings, **rest}

    def __repr__(self) -> str:
        told = [str(finding).partition("\n")[0] for finding in self.findings]
        return summary([f"Conformance of {self._headline}"], told, kind="finding")

    def _repr_html_(self) -> str:
        rows = [(f.kind, f.rule, f.op, f.message, f.graph) for f in self.findings]
        return html_table(("finding", "rule", "op", "message", "graph"), rows, repr(self))

    @property
    def _headline(self) -> str:
        counts = Counter(f.kind for f in self.errors)
        verdict = (
            "passed"
            if self.passed
            else "FAILED: " + (", ".join(f"{n} {k}" for k, n in counts.items()) or "nothing ran")
        )
        return f"{self.quantizer}: {verdict} ({self.examples} graphs, seed {self.seed})"

    def __str__(self) -> str:
        lines = [self._headline]
        width = max(map(len, self.reached), default=0)
        lines += [f"  {rule:<{width}}  {count} times" for rule, count in self.reached.items()]
        lines += [f"note: {note}" for note in self.notes]
        lines += [str(finding) for finding in self.findings]
        return "\n".join(lines)
