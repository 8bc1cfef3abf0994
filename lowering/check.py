"""Check of a lowered program: compared with its graph, and where they differ, the op at which they part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from lowering.choices import Lower, compare_as_chosen
from lowering.first_difference import first_difference, way_out
from lowering.verify import Bound, NotTakenError, Verification
from quant2e.errors import LoweringError
from quant2e.graph.captured.calls import Call


def checked(
    what: str,
    program: Callable[..., Any],
    reference: Any,
    batches: Sequence[Call],
    lower: Lower,
    *,
    graph: GraphModule,
    otherwise: str,
    bound: Bound | None = None,
) -> Verification:
    """How far ``program``, called ``what``, is from ``reference``; raises `LoweringError` beyond the bound.

    The error names the first op at which they part, and how to do without it. ``graph``: the reference as a graph,
    parts of which ``lower`` lowers. ``otherwise``: what to do where that op is not quantized. Calls that were made up,
    at sizes that the graph itself cannot compute, are left out, which the result says.
    """
    left_out: tuple[str, ...] = ()
    while True:
        try:
            found = compare_as_chosen(program, reference, graph, batches, lower, bound)
        except NotTakenError as error:
            left_out = (*left_out, str(error))
            batches = [call for call in batches if call is not error.call]
        else:
            break
    found = replace(found, left_out=left_out)
    if not found.passed:
        place = _place(graph, batches, lower, otherwise)
        raise LoweringError(f"{what} does not compute what its Q/DQ graph says: {found}; {place}")
    return found


def _place(graph: GraphModule, batches: Sequence[Call], lower: Lower, otherwise: str) -> str:
    first = first_difference(graph, batches, lower)
    if first is None:
        return f"no part of the graph up to one of its ops shows the difference. {otherwise}"
    return f"{first}. {way_out(first.op) or otherwise}"
