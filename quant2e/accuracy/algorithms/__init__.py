"""Algorithms that mend accuracy: rewrites of a captured graph, or of the weights of a calibrated one.

In one call, guarded: ``quantize(..., algorithms=["equalize", {"smooth": {"alpha": 0.5}}])``, or ``algorithms="auto"``.
"""

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.registry import AlgorithmItem, Algorithms, read_algorithms

__all__ = [
    "Algorithm",
    "AlgorithmItem",
    "Algorithms",
    "Context",
    "Stage",
    "read_algorithms",
]
