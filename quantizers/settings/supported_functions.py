"""Supported functions: what a table of rules quantizes, as PT2E's ``get_supported_operators`` answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

import torch

from quant2e.annotation.pattern import Arg, Either, Pattern, short_name
from quantizers.kit.rule import Rule

Functions = list[Callable[..., Any]]


def supported_functions(rules: Iterable[Rule]) -> list[Functions]:
    """What the rules match: lists of functions that follow each other, without repetitions, in the order of the rules.

    An op is named by ``torch.nn.functional``'s function, or ``torch``'s, or by its ATen packet where neither has one.
    """
    chains = (tuple(chain) for rule in rules for chain in _chains(rule.pattern))
    return [list(chain) for chain in dict.fromkeys(chains)]


def _chains(pattern: Pattern) -> Iterator[Functions]:
    """The ops of each choice, innermost first."""
    for choice in pattern.choices if isinstance(pattern, Either) else (pattern,):
        parts = (*choice.operands, *(part for _, part in choice.keywords))
        inner = [list(_chains(part)) for part in parts if not isinstance(part, Arg)]
        functions = dict.fromkeys(map(_function, sorted(choice.targets, key=str)))
        for *before, last in product(*inner, ([function] for function in functions)):
            yield [function for chain in before for function in chain] + last


def _function(target: Callable[..., Any]) -> Callable[..., Any]:
    name = short_name(target).removesuffix("_")
    for home in (torch.nn.functional, torch):
        function: Callable[..., Any] | None = getattr(home, name, None)
        if callable(function):
            return function
    packet: Callable[..., Any] = getattr(target, "overloadpacket", target)
    return packet
