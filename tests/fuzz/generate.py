"""Generation: programs that Hypothesis composes of a quantizer's own patterns and of blocks that it leaves float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import hypothesis
from hypothesis import strategies as st

from quant2e.annotation.quantizer import Quantizer
from quantizers.conformance.capabilities import AROUND, COMMON, TestedPatterns, patterns_to_test
from quantizers.conformance.generate import by_dice
from quantizers.conformance.op_calls import build
from quantizers.conformance.program import Program, Ref
from quantizers.conformance.program_builder import UnfitError
from tests.fuzz.blocks import BLOCKS, FuzzBuilder
from tests.fuzz.program import PLAIN, ROLES, VALUES, FuzzProgram, Parameter, Values

Choose = Callable[[Sequence[Any]], Any]

KINDS = ("normal", "normal", "normal", "positive", "negative")
SPECIAL = tuple(kind for kind in VALUES if kind not in PLAIN)
ODD_WEIGHTS = tuple(role for role in ROLES if role.startswith("weight_"))


def composed(patterns: TestedPatterns, choose: Choose) -> FuzzProgram | None:
    """One program; None where nothing could be written."""
    kinds = choose([KINDS, KINDS, (*KINDS, *SPECIAL)])
    varies = choose([False, False, True])
    builder = FuzzBuilder(choose, kinds, first=choose([2, 3, 5]) if varies else None)
    for _ in range(choose([3, 2, 4, 5, 1, 6])):
        _add(builder, _written(patterns, choose))
    if not builder.size:
        return None
    known = builder.floats()
    extra = [choose(known)] if known and choose([False, False, True]) else []
    program = FuzzProgram.of(builder.finish(extra)[0], varies=varies)
    if len(program.outputs) > 1 and choose([False, False, True]):
        program = replace(program, outputs=program.outputs[:1])  # what the others need is dead
    if choose([False, False, False, True]):
        program = with_weights(program, choose(ODD_WEIGHTS))
    return program if program.outputs else None


def with_weights(program: FuzzProgram, role: str) -> FuzzProgram:
    """The program with weights of that role."""

    def change(item: Any) -> Any:
        weight = isinstance(item, Parameter) and item.role == "weight" and len(item.shape) > 1
        return replace(item, role=role) if weight else item

    return replace(program, steps=tuple(step.changed(change) for step in program.steps))


def _written(patterns: TestedPatterns, choose: Choose) -> Callable[[FuzzBuilder], Ref]:
    """A pattern of the quantizer's, an op in common use, or a block of ours."""
    source = choose(["own", "own", "common", "around", "block", "block"])
    if source == "block":
        rare = choose([*[False] * 30, True])  # dynamo traces bodies: seconds for each
        return choose(BLOCKS["bodies" if rare else choose([group for group in BLOCKS if group != "bodies"])])
    options = {"own": [p.pattern for p in patterns.patterns], "common": COMMON, "around": AROUND}[source]
    pattern = choose(options)
    return lambda builder: build(builder, pattern, {})


def _add(builder: FuzzBuilder, write: Callable[[FuzzBuilder], Ref]) -> None:
    state = builder.state()
    try:
        write(builder)
    except UnfitError:
        builder.back_to(state)


def programs(quantizer: Quantizer, examples: int, seed: int) -> list[FuzzProgram]:
    """Programs for a quantizer, without those that were there before; equal seeds give equal programs."""
    patterns = patterns_to_test(quantizer)
    found: dict[str, FuzzProgram] = {}

    @st.composite
    def one(draw: Any) -> FuzzProgram | None:
        # Hypothesis varies what it has drawn before, a die does not: one goes deep, the other wide.
        if draw(st.booleans()):
            return composed(patterns, by_dice(draw(st.integers(0, 2**32))))
        return composed(patterns, lambda options: draw(st.sampled_from(list(options))))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(one())
    def collect(program: FuzzProgram | None) -> None:
        if program is not None:
            found.setdefault(str(program), program)

    collect()
    return list(found.values())


__all__ = ["Program", "Values", "composed", "programs", "with_weights"]
