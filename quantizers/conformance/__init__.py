"""Conformance of a quantizer: graphs over its own capabilities through the whole flow, and what an author should know.

    from quantizers.conformance import check

    report = check(NpuQuantizer())
    assert report.passed, report

In: a quantizer. Out: a `Conformance` with findings as data, each with the rule, the node and a small graph that shows
it. Needs Hypothesis.
"""

from quantizers.conformance.check import check
from quantizers.conformance.program import Given, Program, Shape, Step
from quantizers.conformance.report import KINDS, Conformance, Finding

__all__ = ["KINDS", "Conformance", "Finding", "Given", "Program", "Shape", "Step", "check"]
