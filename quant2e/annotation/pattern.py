"""Pattern language over ATen ops, with patterns as values: ``match``, ``find``, ``explain``.

    x, w, b = Arg("x"), constant("w"), Arg("b", optional=True)
    mac = op(aten.conv2d.default, aten.linear.default)(x, w, bias=b)
    clamp = op(aten.relu.default, aten.hardtanh.default)
    residual = clamp(op(aten.add.Tensor)([mac, Arg("y")]))     # a list of operands: in any order

The language is ``op``, ``Arg``, ``constant``, ``|``, a list, and ``when``; anything else is Python in ``annotate``.

What a match promises:

- it looks at ATen targets and data flow only; keyword and positional operands are the same, defaults included;
- operands that the pattern does not mention are free;
- an op includes its in-place spelling (``relu`` finds ``relu_``), unless a view would see the change;
- every node of the match but its root has exactly one use, which is inside the match;
- no bound operand is produced inside the match, and a name that occurs twice is the same tensor twice;
- a norm of ``folded`` is looked through, as if it were folded already: ``relu(mac(x, w, b))`` is found where the graph
  has ``relu(batch_norm(mac(x, w)))``, with the norm's shift as ``b`` where the op has no bias of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, Node

from quant2e.annotation.mismatch import Mismatch, no_tensor, unmet
from quant2e.errors import AnnotationError
from quant2e.graph.constants import Constants, Variation
from quant2e.graph.dataflow import operand

NodeEdge = tuple[Node, Node]
"""``(producer, consumer)``."""

Condition = Callable[[Node], bool | str]
"""Looks at one node and answers True, False, or the reason why not."""

Folded = Mapping[Node, Node]
"""Norms that will be folded: norm → the op into which it will be."""

_NONE: Folded = MappingProxyType({})


# ---------------------------------------------------------------- the language


@dataclass(frozen=True, slots=True)
class Arg:
    """An operand that comes from outside the pattern, under a name.

    ``optional``: the operand may be absent. ``constant``: its value depends on parameters and buffers only.
    An operand that is a list of tensors (as ``cat`` takes) binds all of them.
    """

    name: str
    optional: bool = False
    constant: bool = False

    def __str__(self) -> str:
        return self.name + "?" * self.optional


def constant(name: str, *, optional: bool = False) -> Arg:
    """An operand whose value depends on parameters and buffers only, possibly through views and arithmetic."""
    return Arg(name, optional=optional, constant=True)


@dataclass(frozen=True, slots=True)
class Op:
    """A call to one of ``targets``. Built by `op`; calling it says what its operands are.

    ``aliased``: also one that writes in place to a tensor that others see, for rewrites that leave the write as it is.
    """

    targets: frozenset[Callable[..., Any]]
    operands: tuple[Arg | Op | Either, ...] = ()
    keywords: tuple[tuple[str, Arg | Op | Either], ...] = ()
    any_order: bool = False
    when: Condition | None = None
    aliased: bool = False

    def __call__(self, *operands: Arg | Op | Either | list[Arg | Op | Either], **keywords: Arg | Op | Either) -> Op:
        """The same op with operands, by position or by the schema's names. A single list means "in any order"."""
        match operands:
            case [list(items)]:
                flat, any_order = tuple(items), True
            case _:
                flat, any_order = tuple(item for item in operands if not isinstance(item, list)), False
        if len(flat) < len(operands) or not all(isinstance(w, Arg | Op | Either) for w in (*flat, *keywords.values())):
            raise AnnotationError(
                f"operands {operands} {keywords}: an operand is an Arg, a constant or another pattern, and a list of "
                "operands stands alone; conditions on numbers go into when="
            )
        return replace(self, operands=flat, keywords=tuple(keywords.items()), any_order=any_order)

    def __or__(self, other: Op | Either) -> Either:
        return Either((self,)) | other

    def __str__(self) -> str:
        names = sorted({short_name(t).removesuffix("_") for t in self.targets})
        inside = ", ".join([*map(str, self.operands), *(f"{name}={value}" for name, value in self.keywords)])
        return f"{'|'.join(names)}({f'[{inside}]' if self.any_order else inside})"


@dataclass(frozen=True, slots=True)
class Either:
    """The first of ``choices`` that matches."""

    choices: tuple[Op, ...]

    def __or__(self, other: Op | Either) -> Either:
        return Either((*self.choices, *_choices(other)))

    def __str__(self) -> str:
        return " | ".join(map(str, self.choices))


Pattern = Op | Either


def op(*targets: Callable[..., Any], when: Condition | None = None) -> Op:
    """A call to any of ``targets``: ATen overloads with their in-place spellings, whole packets, or Python functions.

    ``when`` is a condition on the node itself (a literal, a shape); it answers True, False or the reason why not.
    """
    if not targets:
        raise AnnotationError("op() needs at least one target, such as torch.ops.aten.relu.default")
    spelled: set[Callable[..., Any]] = set()
    for target in targets:
        for overload in _overloads(target):
            spelled.add(overload)
            if (in_place := _in_place_spelling(overload)) is not None:
                spelled.add(in_place)
    return Op(frozenset(spelled), when=when)


def _overloads(target: Callable[..., Any]) -> list[Callable[..., Any]]:
    if isinstance(target, OpOverloadPacket):
        found = [getattr(target, name) for name in target.overloads()]
        return [o for o in found if not any(a.is_out for a in o._schema.arguments)]
    if not callable(target):
        raise AnnotationError(f"{target!r} is not an op: give an overload such as torch.ops.aten.relu.default")
    return [target]


def _in_place_spelling(target: Callable[..., Any]) -> Callable[..., Any] | None:
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return None
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name + "_", None)
    overload = target._schema.overload_name or "default"
    return getattr(packet, overload, None) if packet is not None and overload in packet.overloads() else None


def short_name(target: object) -> str:
    """``conv2d`` for ``aten.conv2d.default``; the plain name of a Python function."""
    if isinstance(target, OpOverload):
        return target._schema.name.partition("::")[2]
    return str(getattr(target, "__name__", target))


# ---------------------------------------------------------------- matches


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """Where a pattern was found.

    ``root``: the node whose value leaves the pattern. ``nodes``: all nodes of the pattern, in graph order of data.
    ``operands``: for each name the edges it stands for (several for a list of tensors, or a name used twice).
    ``folded``: the norms that were looked through; the root may be one.
    """

    root: Node
    nodes: tuple[Node, ...]
    operands: Mapping[str, tuple[NodeEdge, ...]]
    folded: tuple[Node, ...] = ()

    @property
    def edges(self) -> Mapping[str, NodeEdge]:
        """For each name ``(producer, consumer)``; the first, where a name stands for several."""
        return {name: edges[0] for name, edges in self.operands.items()}


@dataclass(frozen=True, slots=True)
class _Found:
    """What an attempt has found so far: nodes from the root inwards, bound edges.

    ``results``: for each node the one that has its value, which is the norm that will be folded into it if there is
    one.
    """

    nodes: tuple[Node, ...] = ()
    results: tuple[Node, ...] = ()
    edges: tuple[tuple[str, NodeEdge], ...] = ()

    def match(self) -> Match:
        operands: dict[str, tuple[NodeEdge, ...]] = {}
        for name, edge in self.edges:
            operands[name] = (*operands.get(name, ()), edge)
        folded = tuple(result for result in self.results if result not in self.nodes)
        return Match(self.results[0], tuple(reversed(self.nodes)), operands, folded)


_Wanted = tuple["Arg | Pattern", Any, Node, str]
"""What a pattern wants of an operand, the operand, the node that reads it, and which of its operands it is."""


@dataclass(slots=True)
class _Search:
    """One search: the constants of the graph, found when first needed, and the failure that got furthest."""

    constants: Constants | None
    folded: Folded
    explaining: bool
    nearest: Mismatch | None = None
    size: int = 0
    """Ops in the alternative that is being tried."""

    def miss(self, node: Node, found: _Found, reason: str, *, known: bool = False) -> None:
        mismatch = Mismatch(node, reason, len(found.nodes), self.size - len(found.nodes), known)
        self.nearest = mismatch.or_nearer(self.nearest)

    def variation(self, producers: Sequence[Node]) -> Variation | None:
        """Why one of the producers is not constant; None if all are."""
        if self.constants is None:
            self.constants = Constants(producers[0].graph)
        return next(filter(None, map(self.constants.variation, producers)), None)

    def call(self, pattern: Pattern, result: Node, found: _Found) -> Iterator[_Found]:
        node = self.folded.get(result, result)
        for choice in _choices(pattern):
            if self.explaining and not found.nodes:
                self.size = _size(choice)
            if not self.explaining and node.target not in choice.targets:
                continue
            if (reason := _head_mismatch(choice, node, result, inner=bool(found.nodes))) is not None:
                self.miss(node, found, reason, known=node.target in choice.targets)
                continue
            grown = replace(found, nodes=(*found.nodes, node), results=(*found.results, result))
            keywords = [(want, *_read(node, name, result), name) for name, want in choice.keywords]
            orders = itertools.permutations(choice.operands) if choice.any_order else [choice.operands]
            for order in orders:
                wanted = [(want, *_read(node, i, result), f"operand {i}") for i, want in enumerate(order)]
                yield from self.operands(wanted + keywords, node, grown)

    def operands(self, wanted: Sequence[_Wanted], node: Node, found: _Found) -> Iterator[_Found]:
        if not wanted:
            inside = next((p for _, (p, _) in found.edges if p in found.results), None)
            if inside is None:
                yield found
            else:
                self.miss(node, found, f"'{inside.name}' is both inside the pattern and an operand of it")
            return
        (want, have, reader, place), *rest = wanted
        options = self.bind(want, have, place, reader, found) if isinstance(want, Arg) else ()
        if not isinstance(want, Arg):
            if isinstance(have, Node):
                options = self.call(want, have, found)
            else:
                self.miss(node, found, f"{place} of '{node.name}' is {have!r}, not the result of {want}")
        for option in options:
            yield from self.operands(rest, node, option)

    def bind(self, want: Arg, have: Any, place: str, node: Node, found: _Found) -> Iterator[_Found]:
        producers = tuple(have) if isinstance(have, list | tuple) else (have,)
        if not producers or not all(isinstance(p, Node) for p in producers):
            if want.optional and have is None:
                yield found
            else:
                self.miss(node, found, no_tensor(node, want.name, place, have))
            return
        if want.constant and (why := self.variation(producers)) is not None:
            self.miss(node, found, f"operand '{want.name}' of '{node.name}' is not constant: {why}")
            return
        bound = next((edge[0] for name, edge in found.edges if name == want.name), None)
        if bound is not None and producers != (bound,):
            self.miss(node, found, f"'{want.name}' is '{bound.name}' in one place and '{producers[0].name}' in another")
            return
        yield replace(found, edges=found.edges + tuple((want.name, (p, node)) for p in producers))


def _choices(pattern: Pattern) -> tuple[Op, ...]:
    return pattern.choices if isinstance(pattern, Either) else (pattern,)


def _size(pattern: Arg | Pattern) -> int:
    """The number of ops in a pattern, in its smallest form."""
    if isinstance(pattern, Arg):
        return 0
    parts = ((*choice.operands, *dict(choice.keywords).values()) for choice in _choices(pattern))
    return 1 + min(sum(map(_size, operands)) for operands in parts)


def _read(node: Node, name: int | str, result: Node) -> tuple[Any, Node]:
    """An operand, and the node that reads it: what ``node`` lacks is what the norm behind it has under that name."""
    have = operand(node, name)
    if have is None and result is not node and isinstance(node.target, OpOverload):
        names = [declared.name for declared in node.target._schema.arguments]
        own = names[name] if isinstance(name, int) and name < len(names) else name
        if isinstance(lent := operand(result, own), Node):
            return lent, result
    return have, node


def _head_mismatch(pattern: Op, node: Node, result: Node, *, inner: bool) -> str | None:
    """Why ``node`` is not a call that ``pattern`` describes, before its operands are looked at."""
    if node.op != "call_function" or node.target not in pattern.targets:
        names = " or ".join(sorted({short_name(t).removesuffix("_") for t in pattern.targets}))
        return f"'{node.name}' is {short_name(node.target) if node.op == 'call_function' else node.op}, not {names}"
    return unmet(node, result, pattern.when, inner=inner, aliased=pattern.aliased)


def solutions(
    pattern: Pattern, node: Node, constants: Constants | None = None, *, folded: Folded = _NONE
) -> Iterator[Match]:
    """Every way in which ``pattern`` matches with its root at ``node``, in the order the pattern is written."""
    search = _Search(constants, folded, explaining=False)
    return (found.match() for found in search.call(pattern, node, _Found()))


def match(pattern: Pattern, node: Node, *, folded: Folded = _NONE) -> Match | None:
    """The first way in which ``pattern`` matches with its root at ``node``, or None."""
    return next(solutions(pattern, node, folded=folded), None)


def explain(
    pattern: Pattern, node: Node, constants: Constants | None = None, *, folded: Folded = _NONE
) -> Mismatch | None:
    """Why ``pattern`` does not match with its root at ``node``: the attempt that got furthest. None if it matches."""
    search = _Search(constants, folded, explaining=True)
    if next(search.call(pattern, node, _Found()), None) is not None:
        return None
    return search.nearest


def roots(pattern: Pattern) -> frozenset[Callable[..., Any]]:
    """The targets that the root of a match can have."""
    return frozenset().union(*(choice.targets for choice in _choices(pattern)))


def readers_inside(pattern: Pattern, target: object) -> frozenset[Callable[..., Any]]:
    """The targets of the ops that read the result of ``target`` inside a pattern; none where it is a root or absent."""
    found: set[Callable[..., Any]] = set()
    for choice in _choices(pattern):
        for part in (*choice.operands, *dict(choice.keywords).values()):
            if isinstance(part, Op | Either):
                found |= choice.targets if target in roots(part) else readers_inside(part, target)
    return frozenset(found)


def arguments(pattern: Arg | Pattern) -> dict[str, Arg]:
    """The operands of a pattern by name."""
    if isinstance(pattern, Arg):
        return {pattern.name: pattern}
    parts = [part for choice in _choices(pattern) for part in (*choice.operands, *dict(choice.keywords).values())]
    return {name: arg for part in parts for name, arg in arguments(part).items()}


def find(pattern: Pattern, graph: Graph, *, folded: Folded = _NONE) -> Iterator[Match]:
    """Matches that share no node, in reverse graph order, so that the largest pattern claims its nodes first."""
    taken: set[Node] = set()
    constants = Constants(graph) if any(arg.constant for arg in arguments(pattern).values()) else None
    targets = roots(pattern)
    into = set(folded.values())
    for node in reversed(graph.nodes):
        op = folded.get(node, node)
        if node in into or op.target not in targets or op in taken:
            continue
        free = (m for m in solutions(pattern, node, constants, folded=folded) if taken.isdisjoint(m.nodes))
        if (found := next(free, None)) is not None:
            taken.update(found.nodes)
            yield found
