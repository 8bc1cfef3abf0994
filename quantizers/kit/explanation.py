"""Explanations: every rule that was tried at a node, and what became of it.

A quantizer keeps one `Trial` per rule and node while it annotates, since afterwards the graph is rewritten.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from quant2e.annotation.pattern import readers_inside, short_name
from quant2e.errors import where
from quantizers.kit.rule import Rule

APPLIED, MATCHED, NEARLY = "applied", "matched", "nearly matched"


@dataclass(frozen=True, slots=True)
class Trial:
    """One rule tried with its root at one node.

    ``outcome``: applied; matched, and did not apply for ``reason``; or nearly matched: the pattern stops for
    ``reason``.
    ``size``: ops of the match. ``missing``: ops of the pattern that were not found, where it did not match.
    """

    rule: str
    outcome: str
    reason: str = ""
    size: int = 0
    missing: int = 0

    @property
    def rank(self) -> int:
        """How close it came: whole matches first, the larger the closer; then the fewer ops were missing."""
        return _WHOLE_MATCH + self.size if self.outcome != NEARLY else -self.missing


_WHOLE_MATCH = 100


@dataclass(slots=True)
class Trials:
    """What a quantizer tried, by node name; one run of `annotate`."""

    at: dict[str, list[Trial]] = field(default_factory=lambda: defaultdict(list))
    owner: dict[str, tuple[str, str, tuple[str, ...]]] = field(default_factory=dict)
    """Node name → the rule that annotated it, the root of its match, all nodes of it."""

    def add(self, node: Node, trial: Trial) -> None:
        """Remember one trial, each once: two configurations may have the same rule."""
        if trial not in self.at[node.name]:
            self.at[node.name].append(trial)

    def nearest(self, node: Node) -> Trial | None:
        """The refused trial that came closest; of equals the first."""
        return max((t for t in self.at.get(node.name, ()) if t.outcome != APPLIED), key=lambda t: t.rank, default=None)

    def text(self, node: Node, verdict: str, rules: Sequence[Rule]) -> str:
        """``verdict`` and, on a line each, every rule that was tried at the node or has its op further inside."""
        lines = [f"{where(node)}: {verdict}"]
        if node.name in self.owner:
            rule, root, nodes = self.owner[node.name]
            ends = "which ends here" if root == node.name else f"which ends in '{root}'"
            lines.append(f"  applied: rule '{rule}' to {', '.join(nodes)}, {ends}")
        tried = [t for t in self.at.get(node.name, ()) if t.outcome != APPLIED]
        lines += [f"  {t.outcome}: rule '{t.rule}': {t.reason}" for t in sorted(tried, key=lambda t: -t.rank)]
        if node.name not in self.owner:
            lines += [f"  {NEARLY}: {text}" for text in _as_inner_op(node, rules)]
        return "\n".join(lines)


def _as_inner_op(node: Node, rules: Sequence[Rule]) -> Iterator[str]:
    """Rules that cover the op only together with an op behind it."""
    if node.op != "call_function":
        return
    readers = ", ".join(f"'{user.name}'" for user in node.users) or "nothing"
    told: set[str] = set()
    for rule in rules:
        outer = readers_inside(rule.pattern, node.target)
        if outer and rule.name not in told:
            told.add(rule.name)
            names = " or ".join(sorted({short_name(t).removesuffix("_") for t in outer}))
            covers = f"it covers {short_name(node.target)} only before {names}, and here {readers} reads it"
            yield f"rule '{rule.name}': {covers}"
