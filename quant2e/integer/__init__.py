"""The integer representation: a Q/DQ graph becomes a graph that computes in integers, written in ATen ops only.

In: what `convert_pt2e` returned. Out: a GraphModule that exports, saves, compiles and runs without this package, with an
`IntegerReport`. Every formula is in ``docs/integer_semantics.md``.
"""

from quant2e.integer.convert import to_integer
from quant2e.integer.report import IntegerReport, IntegerVerdict, integer_report
from quant2e.integer.requantization import REQUANTIZATIONS, Requantization

__all__ = [
    "REQUANTIZATIONS",
    "IntegerReport",
    "IntegerVerdict",
    "Requantization",
    "integer_report",
    "to_integer",
]
