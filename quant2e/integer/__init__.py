"""The integer representation: a Q/DQ graph becomes a graph that computes in integers, written in ATen ops only.

In: what `convert_pt2e` returned. Out: a GraphModule that exports, saves, compiles and runs without this package, with
an `IntegerReport`. Every formula is in ``docs/integer_semantics.md``.
"""

from quant2e.integer.accumulators import Accumulator, Overflow, simulate_accumulator
from quant2e.integer.arithmetic.builder import Record
from quant2e.integer.arithmetic.requantization import REQUANTIZATIONS, Requantization
from quant2e.integer.convert import to_integer
from quant2e.integer.report import IntegerReport, IntegerVerdict, integer_report
from quant2e.integer.test_vectors import dump_vectors

__all__ = [
    "REQUANTIZATIONS",
    "Accumulator",
    "IntegerReport",
    "IntegerVerdict",
    "Overflow",
    "Record",
    "Requantization",
    "dump_vectors",
    "integer_report",
    "simulate_accumulator",
    "to_integer",
]
