"""Which configuration applies to which node, and what the user's settings matched.

Precedence, the same in every quantizer: module name, then module type, then operator, then global. Among module names
and among module types the innermost module of a node wins. ``None`` as a config leaves float; a global ``None`` is as
good as none. A setting that matches nothing is an error that lists near misses.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node

from quant2e.errors import AnnotationError
from quant2e.pattern import op, short_name
from quantizers.products import ORIGINAL_TARGET

_GETATTR = re.compile(r"getattr\((?P<owner>[^()]*), '(?P<name>[^']*)'\)")
_INDEX = re.compile(r"(?:\._modules)?\[['\"]?(?P<name>[^\]'\"]+)['\"]?\]")


def module_stack(node: Node) -> list[tuple[str, str]]:
    """``(path, qualified type)`` of the modules around a node, outermost first; the root's path is empty."""
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        qualified = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        found.append((_plain_path(str(path)), qualified))
    return found


def enclosing_paths(node: Node) -> list[str]:
    """Paths of the modules around a node, innermost first, with containers (``ModuleList``), which are never called."""
    paths: dict[str, None] = {}
    for path, _ in reversed(module_stack(node)):
        while path:
            paths[path] = None
            path = path.rpartition(".")[0]
    return [*sorted(paths, key=lambda p: p.count("."), reverse=True), ""]


@lru_cache(maxsize=4096)
def _plain_path(path: str) -> str:
    """``blocks.0.linear`` for ``L['self'].blocks[0].linear`` and the other spellings of tracers."""
    while (plain := _GETATTR.sub(r"\g<owner>.\g<name>", path)) != path:
        path = plain
    path = path.removeprefix("L['self']")
    path = _INDEX.sub(r".\g<name>", path)
    # The second call of a module is traced as "linear@1".
    return ".".join(part.partition("@")[0] for part in path.split(".") if part)


def type_name(module_type: type | str) -> str:
    """The qualified name by which a module type is found in a graph."""
    if isinstance(module_type, str):
        public = _import(module_type)
        return module_type if public is None else f"{public.__module__}.{public.__qualname__}"
    return f"{module_type.__module__}.{module_type.__qualname__}"


def _import(qualified: str) -> type | None:
    """``torch.nn.Linear`` as the class, if it is spelled by its public name."""
    found: Any = torch
    for part in qualified.removeprefix("torch.").split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and qualified.startswith("torch.") else None


def targets_of(function: Any) -> frozenset[Any]:
    """The ATen overloads that a function of torch, an overload or a packet stands for, in-place spellings included.

    Raises `AnnotationError` for what has no ATen op of its name.
    """
    if isinstance(function, OpOverload | OpOverloadPacket):
        return op(function).targets
    name = str(getattr(function, "__name__", function)).strip("_").removeprefix("i" if function in _IN_PLACE else "")
    packet = getattr(torch.ops.aten, name, None)
    if not callable(function) or not isinstance(packet, OpOverloadPacket) or not _computes(packet):
        near = difflib.get_close_matches(name, dir(torch.nn.functional), n=3)
        raise AnnotationError(
            f"{function!r} is not an op: give an overload (torch.ops.aten.linear.default), a packet, or a function such "
            "as torch.nn.functional.linear" + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    return op(packet).targets


def _computes(packet: OpOverloadPacket) -> bool:
    """Whether some overload answers with a tensor."""
    schemas = (getattr(packet, name)._schema for name in packet.overloads())
    return any("Tensor" in str(result.type) for schema in schemas for result in schema.returns)


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.imatmul)


@dataclass(frozen=True, slots=True)
class Choice:
    """The configuration of one node. ``setting``: what the user wrote; empty when nothing applies.

    ``explicit``: the setting names the node's op or module, so that ``None`` means "float" and not "nothing said".
    """

    config: Any
    setting: str = ""
    explicit: bool = False


@dataclass(slots=True)
class Settings:
    """What the user set, in the order it was set."""

    everywhere: Any = None
    names: dict[str, Any] = field(default_factory=dict)
    types: dict[str, Any] = field(default_factory=dict)
    operators: dict[frozenset[Any], tuple[str, Any]] = field(default_factory=dict)
    only: Callable[[Node], bool] | None = None

    def configs(self) -> list[Any]:
        """The distinct configurations that quantize something."""
        written = (
            *self.names.values(),
            *self.types.values(),
            *(c for _, c in self.operators.values()),
            self.everywhere,
        )
        distinct: list[Any] = []
        for config in written:
            if config is not None and config not in distinct:
                distinct.append(config)
        return distinct

    def choose(self, node: Node) -> Choice:
        """The configuration of ``node``."""
        if self.only is not None and not self.only(node):
            return Choice(None, "the filter function, which answers False", explicit=True)
        return next(self._applicable(node), Choice(None))

    def _applicable(self, node: Node) -> Iterator[Choice]:
        for path in enclosing_paths(node) if self.names else ():
            if path in self.names:
                yield Choice(self.names[path], f"module name '{path}'", explicit=True)
        for _, qualified in reversed(module_stack(node)) if self.types else ():
            for wanted, config in self.types.items():
                if _is_type(qualified, wanted):
                    yield Choice(config, f"module type '{wanted}'", explicit=True)
        for targets, (spelled, config) in self.operators.items():
            if not targets.isdisjoint(_targets(node)):
                yield Choice(config, f"operator '{spelled}'", explicit=True)
        if self.everywhere is not None:
            yield Choice(self.everywhere, "the global configuration")

    def unmatched(self, gm: GraphModule) -> tuple[list[str], list[str]]:
        """Settings that cover no op: of modules that exist and compute nothing (any more); of what does not exist.

        One sentence each; the second kind is a mistake, and comes with near misses.
        """
        nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
        paths = {path for node in nodes for path in enclosing_paths(node)}
        kinds = {kind for node in nodes for _, kind in module_stack(node)}
        found = {target for node in nodes for target in _targets(node)}
        owners = {path for path, _ in gm.named_modules()} | {n.target for n in gm.graph.nodes if n.op == "call_module"}
        absent: list[str] = []
        wrong: list[str] = []
        for name in self.names.keys() - paths:
            (absent if name in owners else wrong).append(
                f"no module named '{name}' computes anything in this graph" + _near(name, paths) * (name not in owners)
            )
        for wanted in self.types:
            if not any(_is_type(kind, wanted) for kind in kinds):
                folded = wanted.rpartition(".")[2].startswith("BatchNorm")
                (absent if folded else wrong).append(
                    f"no module of type '{wanted}' computes anything in this graph"
                    + (": batch norms are folded into convolutions" if folded else _near(wanted, kinds))
                )
        for targets, (spelled, _) in self.operators.items():
            if targets.isdisjoint(found):
                wrong.append(f"no op in this graph is {spelled}" + _near(spelled, map(short_name, found)))
        return absent, wrong


def _targets(node: Node) -> set[Any]:
    """What a node calls, and what it called before it was rewritten."""
    return {node.target, node.meta.get(ORIGINAL_TARGET, node.target)}


def _is_type(qualified: str, wanted: str) -> bool:
    return qualified == wanted or ("." not in wanted and qualified.rpartition(".")[2] == wanted)


def _near(wanted: str, known: Iterable[str]) -> str:
    """The closest known names: by spelling as a whole, or by their last part."""
    ordered = sorted(name for name in known if name)
    tail = wanted.rpartition(".")[2]
    close = difflib.get_close_matches(wanted, ordered, n=3, cutoff=0.5)
    tails = {name.rpartition(".")[2]: name for name in reversed(ordered)}
    close += [tails[t] for t in difflib.get_close_matches(tail, list(tails), n=3, cutoff=0.7)]
    names = ", ".join(f"'{name}'" for name in dict.fromkeys(close))
    if names:
        return f"; did you mean {names}?"
    return f"; there is {', '.join(repr(n) for n in ordered[:8])}{' …' * (len(ordered) > 8)}" if ordered else ""
