"""Declared capabilities: the patterns of a quantizer, from which graphs for it are composed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from quant2e.annotation.pattern import Arg, Either, Op, Pattern, op
from quant2e.annotation.quantizer import Quantizer
from quantizers.conformance.op_calls import is_known
from quantizers.kit import families as f
from quantizers.kit.rule import Rule
from quantizers.kit.rule_quantizer import RuleQuantizer

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class TestedPattern:
    """One alternative of a rule's pattern, or of the ops that every backend meets. ``rule`` is empty for the latter."""

    pattern: Op
    rule: str = ""
    follows: bool = False


@dataclass(frozen=True, slots=True)
class TestedPatterns:
    """``patterns`` to compose; ``rules``: names of all; ``unwritten``: rules whose ops cannot be written, and why.

    ``declared``: they are the quantizer's own; of one that does not tell, the ops in common use are assumed.
    """

    patterns: tuple[TestedPattern, ...]
    rules: tuple[str, ...]
    unwritten: tuple[tuple[str, str], ...]
    declared: bool


def _residual() -> Op:
    return op(aten.relu.default)(f.add([f.conv2d, f.y]))


_UNARY = op(
    aten.relu.default, aten.hardtanh.default, aten.sigmoid.default, aten.hardswish.default, aten.silu.default,
    aten.gelu.default, aten.tanh.default, aten.softmax.int, aten.leaky_relu.default,
)(f.x)  # fmt: skip

COMMON: tuple[Op, ...] = (
    f.conv2d,
    f.linear,
    f.relu(f.conv2d),
    f.relu(f.linear),
    f.conv1d,
    _residual(),
    f.add(f.x, f.y),
    f.mul(f.x, f.y),
    f.cat(f.x),
    op(aten.max_pool2d.default)(f.x),
    op(aten.avg_pool2d.default)(f.x),
    op(aten.adaptive_avg_pool2d.default)(f.x),
    f.mean(f.x),
    _UNARY,
    op(aten.matmul.default)(f.x, f.y),
    op(aten.flatten.using_ints, aten.view.default, aten.permute.default, aten.transpose.int, aten.slice.Tensor)(f.x),
    op(aten.layer_norm.default)(f.x),
    op(aten.embedding.default)(f.w),
    f.conv_transpose2d,
)
"""What graphs are made of when a quantizer does not say what it takes."""

AROUND: tuple[Op, ...] = (
    op(aten.sigmoid.default, aten.gelu.default, aten.softmax.int)(f.x),
    op(aten.view.default, aten.permute.default, aten.flatten.using_ints)(f.x),
    op(aten.cat.default)(f.x),
    op(aten.add.Tensor, aten.mul.Tensor)(f.x, f.y),
    op(aten.layer_norm.default)(f.x),
)
"""What stands between the quantizer's own patterns: ops that it may leave float."""


def patterns_to_test(quantizer: Quantizer) -> TestedPatterns:
    """The capabilities of a quantizer: its rules, those of the quantizers it is composed of, or the common ops."""
    rules = [rule for table in _tables(quantizer) for rule in table]
    patterns: dict[TestedPattern, None] = {}
    unwritten: dict[str, str] = {}
    for rule in rules:
        own = list(_alternatives(rule))
        patterns.update(dict.fromkeys(own))
        if not own:
            unwritten[rule.name] = f"no call of {rule.pattern} can be written"
    names = tuple(dict.fromkeys(rule.name for rule in rules))
    written = {tested.rule for tested in patterns}
    missing = tuple((name, why) for name, why in unwritten.items() if name not in written)
    if not patterns:
        return TestedPatterns(tuple(TestedPattern(pattern) for pattern in COMMON), names, missing, declared=False)
    if _all_declare(quantizer):
        return TestedPatterns(tuple(patterns), names, missing, declared=True)
    return TestedPatterns((*patterns, *(TestedPattern(pattern) for pattern in COMMON)), names, missing, declared=False)


def _tables(quantizer: Quantizer) -> Iterator[Sequence[Rule]]:
    if isinstance(quantizer, RuleQuantizer):
        yield from (quantizer.table(config) for config in quantizer.configs())
    for child in getattr(quantizer, "quantizers", ()) or ():
        yield from _tables(child)


def _all_declare(quantizer: Quantizer) -> bool:
    children = getattr(quantizer, "quantizers", None)
    return all(map(_all_declare, children)) if children else isinstance(quantizer, RuleQuantizer)


def opt_in_rules(quantizer: Quantizer) -> set[str]:
    """Rules that wait until a user names the op."""
    return {rule.name for table in _tables(quantizer) for rule in table if rule.opt_in}


def _alternatives(rule: Rule) -> Iterator[TestedPattern]:
    for choice in rule.pattern.choices if isinstance(rule.pattern, Either) else (rule.pattern,):
        if _can_be_written(choice):
            yield TestedPattern(choice, rule.name, rule.follows)


def _can_be_written(pattern: Arg | Pattern) -> bool:
    if isinstance(pattern, Arg):
        return True
    if isinstance(pattern, Either):
        return any(map(_can_be_written, pattern.choices))
    inner = (*pattern.operands, *dict(pattern.keywords).values())
    return any(map(is_known, pattern.targets)) and all(map(_can_be_written, inner))


__all__ = ["AROUND", "COMMON", "TestedPattern", "TestedPatterns", "opt_in_rules", "patterns_to_test"]
