"""Rewrites by pattern: an equation between a pattern and what takes its place.

    square(x)  =  x · x

    def build(gm, match):
        x, _ = match.edges["x"]
        return emit(match.root, aten.mul.Tensor, x, x)

    square = Rewrite("square", op(aten.square.default)(Arg("x")), build)

A rewrite is a pass. Where it did not apply it says why: `explain`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from quant2e.annotation.pattern import Match, Pattern, arguments, explain, roots, solutions
from quant2e.graph.constants import Constants
from quant2e.graph.edit import replace

Replacement = Callable[[GraphModule, Match], Node]
"""Builds what takes the place of a match in front of its root, or edits the root in place; returns the node that gives
the result from now on."""

Requirement = Callable[[Match], bool | str]
"""Looks at a match and answers True, False, or the reason why it must not be rewritten."""


@dataclass(frozen=True, slots=True)
class Rewrite:
    """``pattern`` = ``build``, where ``when`` holds: a pass.

    The nodes of a match that nothing reads any more stay for dead code elimination, but for the root.
    """

    name: str
    pattern: Pattern
    build: Replacement
    when: Requirement | None = None

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, gm: GraphModule) -> int:
        """Rewrite every match, in the order of the graph; returns how many."""
        return _rewrite_all(gm, (self,))

    def refusal(self, match: Match) -> str | None:
        """Why a match of the pattern must not be rewritten; None if it is."""
        answer = True if self.when is None else self.when(match)
        return None if answer is True else answer or f"it does not meet {getattr(self.when, '__name__', self.when)}"

    def explain(self, node: Node, constants: Constants | None = None) -> str | None:
        """Why the rewrite does not apply with its root at ``node``; None if it does."""
        reason = None
        for match in solutions(self.pattern, node, constants):
            if (answer := self.refusal(match)) is None:
                return None
            reason = reason or answer
        if reason is not None:
            return reason
        mismatch = explain(self.pattern, node, constants)
        return None if mismatch is None else str(mismatch)


@dataclass(frozen=True, slots=True)
class RewriteTable:
    """Rewrites that one walk over the graph applies, at each node the first that can: a pass."""

    name: str
    rewrites: Sequence[Rewrite]

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, gm: GraphModule) -> int:
        """Rewrite every match, in the order of the graph; returns how many."""
        return _rewrite_all(gm, self.rewrites)

    def explain(self, node: Node) -> str | None:
        """Why no rewrite applies at ``node``, by those for such an op; None if one does."""
        rooted = [rewrite for rewrite in self.rewrites if node.target in roots(rewrite.pattern)]
        reasons = [rewrite.explain(node) for rewrite in rooted]
        if None in reasons:
            return None
        told = "; ".join(f"{r.name}: {reason}" for r, reason in zip(rooted, reasons, strict=True))
        return told or f"no rewrite of {self.name} is for {node.target}"


def _rewrite_all(gm: GraphModule, rewrites: Iterable[Rewrite]) -> int:
    table: dict[object, list[Rewrite]] = {}
    for rewrite in rewrites:
        for target in roots(rewrite.pattern):
            table.setdefault(target, []).append(rewrite)
    of_constants = any(arg.constant for found in table.values() for r in found for arg in arguments(r.pattern).values())
    constants = Constants(gm.graph) if of_constants else None
    count = 0
    for node in list(gm.graph.nodes):
        for rewrite in table.get(node.target, ()) if not node._erased else ():
            matches = solutions(rewrite.pattern, node, constants)
            found = next((match for match in matches if rewrite.refusal(match) is None), None)
            if found is None:
                continue
            built = rewrite.build(gm, found)
            if built is not node:
                replace(node, built)
            count += 1
            break
    return count
