"""Mismatches: why a pattern does not match at a node, in the words that reports and errors show.

Of several attempts the one that got furthest explains: it found the most ops, the next is of the kind it wants, and
of these it lacks the fewest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from quant2e.graph.dataflow import uses
from quant2e.graph.mutation import seen_through


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why a pattern does not match: the attempt that got furthest.

    ``matched`` counts the ops that were found before, ``missing`` those of the pattern that were not. ``known``: the op
    is one that the pattern names there, and something about it does not fit.
    """

    node: Node
    reason: str
    matched: int
    missing: int
    known: bool = False

    def __str__(self) -> str:
        return self.reason

    def or_nearer(self, earlier: Mismatch | None) -> Mismatch:
        """The one that got further; the earlier one where both got equally far."""
        return self if earlier is None or self._depth > earlier._depth else earlier

    @property
    def _depth(self) -> tuple[int, bool, int]:
        return self.matched, self.known, -self.missing


def no_tensor(node: Node, name: str, place: str, have: Any) -> str:
    """The reason that operand ``name`` of ``node`` is absent, or ``have``, a literal."""
    kind = "is missing" if have is None else f"is the literal {have!r}, not a tensor"
    return f"operand '{name}' ({place}) of '{node.name}' {kind}"


def unmet(
    node: Node, result: Node, when: Callable[[Node], bool | str] | None, *, inner: bool, aliased: bool
) -> str | None:
    """Why a call of a wanted op does not serve; None if it does.

    ``result``: the node that has its value. ``inner``: only the pattern may use it. ``aliased``: it may write in place
    to a tensor that others see. ``when``: what the pattern asks of the call itself.
    """
    if inner and (count := uses(result)) != 1:
        return f"the output of '{result.name}' is used {count} times ({', '.join(u.name for u in result.users)})"
    if not aliased and (alias := seen_through(node)) is not None:
        return f"'{node.name}' writes in place to a tensor that is also seen through '{alias.name}'"
    if when is not None and (answer := when(node)) is not True:
        return answer or f"'{node.name}' does not meet the condition {getattr(when, '__name__', when)}"
    return None
