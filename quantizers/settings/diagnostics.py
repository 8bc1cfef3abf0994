"""Diagnostics of settings: used, unused, shadowed, ambiguous, or without effect in one graph.

Nothing a user wrote is dropped in silence. A setting that names nothing in the graph is an error with near misses. A
note, with the settings and the ops, says that a setting never applies because closer ones take all its ops, that two
settings are equally close and differ, or that what a setting covers stays float.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from quant2e.annotation.pattern import short_name
from quant2e.annotation.specs import ANNOTATION
from quant2e.graph.control_flow import BODY, graphs_of
from quant2e.graph.fake_values import is_float
from quant2e.graph.module_paths import enclosing_paths, module_stack
from quantizers.settings.module_names import targets
from quantizers.settings.scopes import Everything, Level, ModuleName, ModuleType, NodeName, Operator, Scope, Settings

_SHOWN = 4
"""So many ops, names or reasons a message lists."""


@dataclass(slots=True)
class Coverage:
    """Which ops each setting names (``named``), for which it decides (``decided``), and where two are equally close."""

    settings: Settings
    gm: GraphModule
    named: dict[Scope, list[Node]] = field(init=False)
    decided: dict[Scope, list[Node]] = field(init=False)
    ties: dict[tuple[Scope, Scope], list[Node]] = field(init=False)
    elsewhere: frozenset[Scope] = field(init=False)
    """Settings that name ops of bodies of control flow, which are annotated by themselves."""
    taken: frozenset[Node] = field(init=False)
    """Ops that another quantizer annotated before."""

    def __post_init__(self) -> None:
        self.named, self.decided, self.ties = defaultdict(list), defaultdict(list), defaultdict(list)
        self.taken = frozenset(node for node in self._ops() if node.meta.get(ANNOTATION) is not None)
        inside = [node for _, graph in list(graphs_of(self.gm))[1:] for node in _calls(graph)]
        self.elsewhere = frozenset(scope for node in inside for _, scope in self.settings.ranked(node))
        for node in self._ops():
            ranked = self.settings.ranked(node)
            for _, scope in ranked:
                self.named[scope].append(node)
            if ranked:
                self.decided[ranked[0][1]].append(node)
            if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
                winner, other = ranked[0][1], ranked[1][1]
                if self.settings.made[winner] != self.settings.made[other]:
                    self.ties[other, winner].append(node)

    def _ops(self) -> Iterator[Node]:
        return _calls(self.gm)

    def unused(self) -> tuple[list[str], list[str]]:
        """Settings that cover no op: of modules that exist and compute nothing (any more); of what does not exist.

        One sentence each; the second kind is a mistake, and comes with near misses. None for a body of control flow:
        what the settings mean is asked of the whole program.
        """
        if BODY in self.gm.meta:
            return [], []
        absent: list[str] = []
        wrong: list[str] = []
        owners = {path for path, _ in self.gm.named_modules()}
        owners |= {n.target for n in self.gm.graph.nodes if n.op == "call_module"}
        for scope in self.settings.made:
            if scope in self.named or scope in self.elsewhere or isinstance(scope, Everything):
                continue
            exists = isinstance(scope, ModuleName) and scope.spelled in owners
            folded = isinstance(scope, ModuleType) and scope.name.rpartition(".")[2].startswith("BatchNorm")
            reason = ": batch norms are folded into convolutions" if folded else "" if exists else self._near(scope)
            (absent if exists or folded else wrong).append(_nothing(scope) + reason)
        return absent, wrong

    def _near(self, scope: Scope) -> str:
        """What the user may have meant."""
        if isinstance(scope, Operator):
            return near(scope.spelled, (short_name(target) for node in self._ops() for target in targets(node)))
        if isinstance(scope, ModuleType):
            return near(scope.name, (kind for node in self._ops() for _, kind in module_stack(node)))
        if isinstance(scope, ModuleName):
            return near(scope.spelled, (path for node in self._ops() for path in enclosing_paths(node)))
        if isinstance(scope, NodeName):
            return near(scope.name, (node.name for node in self._ops()))
        paths = (path for node in self._ops() for path in enclosing_paths(node))
        return near("", paths) if scope.level is Level.MODULE_NAME else ""

    def notes(self, explain: Callable[[Node], str]) -> list[str]:
        """What the user should know about the settings that are in use, once the graph is annotated."""
        found = []
        tied = {node: other for (other, _), nodes in self.ties.items() for node in nodes}
        for scope, nodes in self.named.items():
            if all(tied.get(node) == scope for node in nodes):
                continue  # said below
            if scope not in self.decided and self.settings.made[scope] is not None:
                closer = dict.fromkeys(str(self.settings.ranked(node)[0][1]) for node in nodes)
                found.append(
                    f"{scope} never applies: {_listed(nodes)} covered by {' and '.join(list(closer)[:_SHOWN])}"
                )
        for (other, winner), nodes in self.ties.items():
            found.append(f"{other} and {winner} name {_names(nodes)} equally closely; the later, {winner}, applies")
        found += [note for scope in self.decided if (note := self._without_effect(scope, explain))]
        return found

    def _without_effect(self, scope: Scope, explain: Callable[[Node], str]) -> str:
        """A sentence about a setting that quantizes none of the ops it decides for; empty if it quantizes some."""
        if self.settings.made[scope] is None or scope.level is Level.EVERYTHING:
            return ""
        nodes = self.decided[scope]
        if any(node.meta.get(ANNOTATION) is not None and node not in self.taken for node in nodes):
            return ""
        if taken := [node for node in nodes if node in self.taken]:
            return f"{scope} quantizes nothing: an earlier quantizer took {_names(taken)}"
        reasons = dict.fromkeys(f"'{n.name}': {explain(n)}" for n in nodes if is_float(n))
        shown = "; ".join(list(reasons)[:_SHOWN]) or "it has no float op"
        return f"{scope} quantizes nothing: {shown}{'; …' * (len(reasons) > _SHOWN)}"


def _calls(gm: GraphModule) -> Iterator[Node]:
    return (node for node in gm.graph.nodes if node.op == "call_function")


def _nothing(scope: Scope) -> str:
    if isinstance(scope, Operator):
        return f"no op in this graph is {scope.spelled}"
    if isinstance(scope, ModuleType):
        return f"no module of type '{scope.name}' computes anything in this graph"
    if isinstance(scope, NodeName):
        return f"no op in this graph is named '{scope.name}'"
    if isinstance(scope, ModuleName) and not scope.is_pattern:
        return f"no module named '{scope.spelled}' computes anything in this graph"
    return f"{scope} names no op in this graph"


def _names(nodes: Sequence[Node]) -> str:
    return ", ".join(f"'{node.name}'" for node in nodes[:_SHOWN]) + " …" * (len(nodes) > _SHOWN)


def _listed(nodes: Sequence[Node]) -> str:
    return f"its only op {_names(nodes)} is" if len(nodes) == 1 else f"its {len(nodes)} ops {_names(nodes)} are"


def near(wanted: str, known: Iterable[str]) -> str:
    """The closest known names: by spelling as a whole, or by their last part; some of them, if none is close."""
    ordered = sorted({name for name in known if name})
    tail = wanted.rpartition(".")[2]
    close = difflib.get_close_matches(wanted, ordered, n=3, cutoff=0.5)
    tails = {name.rpartition(".")[2]: name for name in reversed(ordered)}
    close += [tails[t] for t in difflib.get_close_matches(tail, list(tails), n=3, cutoff=0.7)]
    names = ", ".join(f"'{name}'" for name in dict.fromkeys(close))
    if names:
        return f"; did you mean {names}?"
    return f"; there is {', '.join(repr(n) for n in ordered[:8])}{' …' * (len(ordered) > 8)}" if ordered else ""
