"""Rewrites of a Q/DQ graph that several targets need.

In: the GraphModule of ATen ops that ``torch.export`` gives, with ``meta["val"]`` on its nodes. Out: the same module,
rewritten in place. Each file opens with its rewrite as an equation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from quant2e.passes import Pass, Promise, run
from quant2e.passes.dead_code import prune_unused_attributes, remove_dead_code
from quant2e.passes.runner import KEEPS_ALL


def apply(module: GraphModule, rewrites: Sequence[Pass], promise: Promise = KEEPS_ALL) -> dict[str, int]:
    """Apply rewrites in order, in place, and drop what nothing reads then; returns how often each applied."""
    applied = run(module, rewrites, compiled=False, promise=promise)
    run(module, (remove_dead_code, prune_unused_attributes), compiled=False)
    module.recompile()
    return applied
