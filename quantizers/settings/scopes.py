"""Scopes and precedence of settings: which configuration a node has.

The closest setting wins, whatever the order they were made in:

1. the node itself: by name, then by a predicate
2. a module by name: the innermost; there, an exact name before a glob before a regular expression
3. a module by type: the innermost; there, a qualified name before a bare one
4. an operator: an overload before a packet or a function
5. everything

Of two that are equally close the later applies. A pattern names the *outermost* modules that it matches, and what is
inside them. ``None`` as a configuration leaves float; a global ``None`` is as good as none. A filter function, where
there is one, comes before everything else. Edges are a matter of their own: see `quantizers.settings.edges`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

from torch.fx import Node

from quant2e.errors import AnnotationError, where
from quant2e.graph.control_flow import BODY
from quant2e.graph.edit import PART_OF
from quant2e.graph.module_paths import enclosing_paths, module_stack, plain_path
from quantizers.kit.rule import ChosenConfig
from quantizers.settings.module_names import targets, targets_of, type_name


class Level(IntEnum):
    """What a setting speaks about, from far to close."""

    EVERYTHING = 0
    OPERATOR = 1
    MODULE_TYPE = 2
    MODULE_NAME = 3
    NODE = 4


Specificity = tuple[int, int]
"""How closely a setting names a node, within its level. Larger is closer."""


class Place:
    """A node, and what settings ask about it; each answer is found once."""

    def __init__(self, node: Node) -> None:
        self.node = node

    @cached_property
    def targets(self) -> frozenset[Any]:
        """What it calls, also before it was rewritten."""
        return targets(self.node)

    @cached_property
    def paths(self) -> dict[str, int]:
        """Paths of the modules around it, outermost first, with how deep each is; the root is at 0."""
        return {path: len(path.split(".")) if path else 0 for path in reversed(enclosing_paths(self.node))}

    @cached_property
    def types(self) -> dict[str, int]:
        """Qualified types of those modules, with how deep the innermost of each type is."""
        return {kind: depth for depth, (_, kind) in enumerate(module_stack(self.node))}


@dataclass(frozen=True, slots=True)
class Everything:
    """Every node."""

    level = Level.EVERYTHING

    def __str__(self) -> str:
        return "the global configuration"

    def specificity(self, place: Place) -> Specificity | None:
        """The same for all."""
        return (0, 0)


@dataclass(frozen=True, slots=True)
class Operator:
    """Nodes that call one of ``targets``."""

    spelled: str = field(compare=False)
    targets: frozenset[Any]
    level = Level.OPERATOR

    def __str__(self) -> str:
        return f"operator '{self.spelled}'"

    def specificity(self, place: Place) -> Specificity | None:
        """The fewer ops it stands for, the closer."""
        return None if self.targets.isdisjoint(place.targets) else (-len(self.targets), 0)


@dataclass(frozen=True, slots=True)
class ModuleType:
    """What is inside modules of exactly that class: a qualified name, or a bare one."""

    name: str
    level = Level.MODULE_TYPE

    def __str__(self) -> str:
        return f"module type '{self.name}'"

    def specificity(self, place: Place) -> Specificity | None:
        """By depth; a qualified name is closer than a bare one."""
        bare = "." not in self.name
        return max(((d, not bare) for kind, d in place.types.items() if self.is_of(kind)), default=None)

    def is_of(self, qualified: str) -> bool:
        """Whether it names the type of that qualified name."""
        return qualified == self.name or ("." not in self.name and qualified.rpartition(".")[2] == self.name)


@dataclass(frozen=True, slots=True)
class ModuleName:
    """What is inside the module of that path, in any tracer's spelling; ``*``, ``?`` and ``[…]`` make it a pattern."""

    spelled: str
    level = Level.MODULE_NAME

    def __str__(self) -> str:
        return f"module name '{self.spelled}'"

    def specificity(self, place: Place) -> Specificity | None:
        """By the depth of the outermost module that it names; there, an exact name is closer than a pattern."""
        exact = place.paths.get(plain_path(self.spelled))
        if exact is not None:
            return (exact, 2)
        if not self.is_pattern:
            return None
        match = re.compile(fnmatch.translate(self.spelled)).fullmatch
        return next(((depth, 1) for path, depth in place.paths.items() if path and match(path)), None)

    @property
    def is_pattern(self) -> bool:
        """Whether it has wildcards. They match dots as well."""
        return any(character in self.spelled for character in "*?[")


@dataclass(frozen=True, slots=True)
class ModuleExpression:
    """What is inside modules whose whole path a regular expression matches."""

    expression: re.Pattern[str]
    level = Level.MODULE_NAME

    def __str__(self) -> str:
        return f"module name matching '{self.expression.pattern}'"

    def specificity(self, place: Place) -> Specificity | None:
        """By the depth of the outermost module that it matches."""
        return next(((d, 0) for path, d in place.paths.items() if path and self.expression.fullmatch(path)), None)


@dataclass(frozen=True, slots=True)
class NodeName:
    """The node of that name; inside a body of control flow also by its path, as in the report."""

    name: str
    level = Level.NODE

    def __str__(self) -> str:
        return f"node '{self.name}'"

    def specificity(self, place: Place) -> Specificity | None:
        """Closer than any predicate."""
        if place.node.name == self.name:
            return (1, 0)
        owner = place.node.graph.owning_module
        body = "" if owner is None else owner.meta.get(BODY, "")
        return (2, 0) if body and f"{body}.{place.node.name}" == self.name else None


@dataclass(frozen=True, slots=True)
class Predicate:
    """Nodes that a function answers True for."""

    function: Callable[[Node], bool]
    level = Level.NODE

    def __str__(self) -> str:
        return f"the predicate {name_of(self.function)}"

    def specificity(self, place: Place) -> Specificity | None:
        """Asks the function."""
        return (0, 0) if ask(self.function, place.node) else None


Scope = Everything | Operator | ModuleType | ModuleName | ModuleExpression | NodeName | Predicate

Ranked = list[tuple[tuple[Level, Specificity], Scope]]
"""Scopes, the one that applies first, each with how close it is."""


def name_of(function: Callable[..., Any]) -> str:
    """A function's name, and the line of one that has none."""
    name = str(getattr(function, "__name__", type(function).__name__))
    code = getattr(function, "__code__", None)
    if name == "<lambda>" and code is not None:
        return f"in line {code.co_firstlineno} of {code.co_filename.rpartition('/')[2]}"
    return name


def ask(predicate: Callable[[Node], Any], node: Node) -> bool:
    """The answer of a user's predicate. Raises `AnnotationError` when it fails, with the node it failed on."""
    try:
        return bool(predicate(node))
    except Exception as error:
        raise AnnotationError(
            f"the predicate {name_of(predicate)} failed on {where(node)}: {type(error).__name__}: {error}; it is asked "
            "about every call_function node"
        ) from error


@dataclass(slots=True)
class Settings:
    """What the user set, in the order it was set; a later setting of the same scope replaces the earlier."""

    made: dict[Scope, Any] = field(default_factory=dict)
    only: Callable[[Node], bool] | None = None
    wholes: dict[str, Ranked] = field(default_factory=dict)
    """What `ranked` answered of ops that are written out as several nodes, by name: their nodes have these settings."""

    def put(self, scope: Scope, config: Any) -> None:
        """Add a setting, as the latest."""
        self.made.pop(scope, None)
        self.made[scope] = config

    @property
    def everywhere(self) -> Any:
        """The global configuration."""
        return self.made.get(Everything())

    def configs(self) -> list[Any]:
        """The distinct configurations that quantize something, the closest first."""
        distinct: list[Any] = []
        for _, config in sorted(self.made.items(), key=lambda made: -made[0].level):
            if config is not None and config not in distinct:
                distinct.append(config)
        return distinct

    def choose(self, node: Node) -> ChosenConfig:
        """The configuration of ``node``."""
        part = node.meta.get(PART_OF) in self.wholes
        if self.only is not None and not part and not ask(self.only, node):
            return ChosenConfig(None, "the filter function, which answers False", explicit=True)
        scope = next((scope for _, scope in self.ranked(node)), None)
        if scope is None or (scope.level is Level.EVERYTHING and self.made[scope] is None):
            return ChosenConfig(None)
        return ChosenConfig(self.made[scope], str(scope), explicit=scope.level is not Level.EVERYTHING)

    def ranked(self, node: Node) -> Ranked:
        """The scopes that a node is in, the one that applies first, each with how close it is."""
        if (known := self.wholes.get(node.meta.get(PART_OF, ""))) is not None:
            return known
        return sorted(self._matching(Place(node)), key=lambda pair: pair[0], reverse=True)

    def _matching(self, place: Place) -> Iterator[tuple[tuple[Level, Specificity], Scope]]:
        for scope in reversed(self.made):  # sorting is stable, so that the later comes first
            if (specificity := scope.specificity(place)) is not None:
                yield (scope.level, specificity), scope


def node_scope(node: str | Node | Callable[[Node], bool]) -> NodeName | Predicate:
    """A node by name, by itself (its name), or by a predicate. Raises `AnnotationError` for anything else."""
    if isinstance(node, Node):
        return NodeName(node.name)
    if isinstance(node, str):
        return NodeName(node)
    if not callable(node):
        raise AnnotationError(f"{node!r} is neither the name of a node nor a predicate on nodes")
    return Predicate(node)


def name_scope(name: str | re.Pattern[str]) -> ModuleName | ModuleExpression:
    """A module by name: exact or a glob, ``"re:…"`` or a compiled regular expression.

    Raises `AnnotationError` for an expression that is none, and for what is no name.
    """
    if isinstance(name, re.Pattern):
        return ModuleExpression(name)
    if not isinstance(name, str):
        raise AnnotationError(f"{name!r} is not a module name; for classes there is set_module_type")
    if not name.startswith("re:"):
        scope = ModuleName(name)
        return scope if scope.is_pattern else ModuleName(plain_path(name))
    try:
        return ModuleExpression(re.compile(name.removeprefix("re:")))
    except re.error as error:
        raise AnnotationError(f"'{name}' is not a regular expression: {error}") from error


def type_scope(module_type: type | str) -> ModuleType:
    """Modules by class, qualified name, or bare name. Raises `AnnotationError` for what is none of them."""
    if not isinstance(module_type, type | str):
        raise AnnotationError(f"{module_type!r} is not a module type; for functions there is set_operator_type")
    return ModuleType(type_name(module_type))


def operator_scope(operator_type: Any) -> Operator:
    """Ops of a kind. Raises `AnnotationError` for what has no ATen op of its name."""
    return Operator(str(getattr(operator_type, "__name__", operator_type)), targets_of(operator_type))
