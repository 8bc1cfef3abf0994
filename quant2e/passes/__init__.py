"""Graph passes, one per file.

In: a GraphModule. Out: the same GraphModule, changed in place, with the same float result.
"""

from quant2e.passes.runner import Pass, Promise, run

__all__ = ["Pass", "Promise", "run"]
