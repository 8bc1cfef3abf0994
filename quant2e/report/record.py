"""What travels with a prepared and a converted graph, under ``gm.meta["quant2e"]``: plan, verdicts, encodings.

Everything in it is a value: it survives ``deepcopy``, and no live node is held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import GraphModule

from quant2e.annotation.plan import Plan
from quant2e.errors import Quant2eError
from quant2e.observers.encodings import Encoding
from quant2e.report.report import Report

LEDGER = "quant2e"


@dataclass(frozen=True, slots=True)
class Ledger:
    """``observers``: the submodule that observes each group of the plan; ``encodings``: what it became, once converted."""

    plan: Plan
    observers: tuple[str, ...]
    report: Report
    encodings: tuple[Encoding | None, ...] = field(default=())


def ledger_of(gm: GraphModule) -> Ledger:
    """The ledger of a prepared or converted graph. Raises `Quant2eError` when it has none."""
    ledger = gm.meta.get(LEDGER)
    if not isinstance(ledger, Ledger):
        raise Quant2eError(
            "this graph was not made by quant2e's prepare_pt2e or convert_pt2e (or its meta was dropped): "
            "there is nothing on record about it"
        )
    return ledger
