"""Program generation: one pattern at a time for coverage, and random compositions.

Compositions share inputs and results, use one tensor twice, return what is also used, start at inputs and end at
outputs; some read integers and masks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from quant2e.annotation.pattern import Op, arguments
from quant2e.errors import Quant2eError
from quantizers.conformance.capabilities import AROUND, TestedPattern, TestedPatterns
from quantizers.conformance.op_calls import build
from quantizers.conformance.program import Program
from quantizers.conformance.program_builder import ProgramBuilder, UnfitError

aten = torch.ops.aten

Choose = Callable[[Sequence[Any]], Any]


def read_by(tested: TestedPattern, reader: Op, choose: Choose) -> Program | None:
    """One pattern and an op that reads its result: a condition may ask for it. None where it could not be written."""
    builder = ProgramBuilder(choose)
    grown = any(_grow(builder, tested) for _ in range(6)) and _continue(builder, TestedPattern(reader))
    return builder.finish()[0] if grown else None


def single(tested: TestedPattern, capabilities: TestedPatterns, choose: Choose) -> Program | None:
    """One pattern; between others, where it only follows what is quantized. None where it could not be written."""
    builder = ProgramBuilder(choose)
    others = [p for p in capabilities.patterns if not p.follows and p.rule] if tested.follows else []
    if others:
        _grow(builder, choose(others))
    grown = (tested.follows and _continue(builder, tested)) or any(_grow(builder, tested) for _ in range(6))
    if others and choose([True, False]):
        readers = [choose(others) for _ in range(4)]  # a rule may ask for what reads its result
        if not grown or not any(_continue(builder, after) for after in readers):
            _grow(builder, readers[0])
    return builder.finish()[0] if grown and builder.size else None


def composition(capabilities: TestedPatterns, choose: Choose) -> Program | None:
    """Up to five patterns, some ops around them, some integers. None where nothing could be written."""
    builder = ProgramBuilder(choose)
    for _ in range(choose([2, 3, 1, 4, 5])):
        _grow(builder, choose(capabilities.patterns))
        if choose([False, False, True]):
            _grow(builder, TestedPattern(choose(AROUND)))
    special = choose([None, None, *SPECIAL_INPUTS])
    if special is not None:
        _add(builder, special)
    if not builder.size:
        return None
    known = builder.floats()
    extra = [choose(known)] if known and choose([False, False, True]) else []
    return builder.finish(extra)[0]


def special_input(
    special: Callable[[ProgramBuilder], None], capabilities: TestedPatterns, choose: Choose
) -> Program | None:
    """One of the `SPECIAL_INPUTS`, behind a pattern. None where it could not be written."""
    builder = ProgramBuilder(choose)
    _grow(builder, choose(capabilities.patterns))
    return builder.finish()[0] if _add(builder, special) else None


def _grow(builder: ProgramBuilder, tested: TestedPattern) -> bool:
    return _add(builder, lambda builder: build(builder, tested.pattern, {}))


def _continue(builder: ProgramBuilder, tested: TestedPattern) -> bool:
    """The pattern on the latest result; not where it does not fit."""
    latest = builder.floats()[:1]
    names = [name for name, arg in arguments(tested.pattern).items() if not arg.constant]
    return bool(latest) and any(
        _add(builder, lambda d: build(d, tested.pattern, dict.fromkeys(names, latest[0]))) for _ in range(4)
    )


def _add(builder: ProgramBuilder, write: Callable[[ProgramBuilder], Any]) -> bool:
    """Whether it could be written; the builder is as before where it could not."""
    state = builder.state()
    try:
        write(builder)
    except UnfitError:
        builder.back_to(state)
        return False
    return True


def _masked(builder: ProgramBuilder) -> None:
    """Scores with a mask of integers added: ``x + (1 - mask) * -1e9``."""
    x = builder.pick(rank=3)
    mask = builder.input(builder.shape(x), 2)
    wide = builder.call(aten._to_copy.default, mask, dtype=torch.float32)
    away = builder.call(aten.mul.Tensor, builder.call(aten.rsub.Scalar, wide, 1.0), -1e9)
    builder.call(aten.softmax.int, builder.call(aten.add.Tensor, x, away), -1)


def _indexed(builder: ProgramBuilder) -> None:
    """Rows picked by an index that is computed from data. It is zero, whichever value rounding makes the largest."""
    x = builder.pick(rank=2)
    best = builder.call(aten.argmax.default, x, -1)
    rows = builder.call(aten.remainder.Scalar, best, 1)
    builder.call(aten.relu.default, builder.call(aten.index_select.default, x, 0, rows))


def _counted(builder: ProgramBuilder) -> None:
    """Integers that meet floats: ``x * mask`` of an integer input, whose own sum is added up in integers."""
    x = builder.pick(rank=2)
    count = builder.input(builder.shape(x), 3)
    twice = builder.call(aten.add.Tensor, count, count)
    joined = builder.call(aten.cat.default, [count, twice], 0)
    builder.call(aten.view.default, joined, [-1])
    builder.call(aten.mul.Tensor, x, count)


SPECIAL_INPUTS: tuple[Callable[[ProgramBuilder], None], ...] = (_masked, _indexed, _counted)
"""Integers and masks, which no quantizer may touch."""


def by_dice(seed: int) -> Choose:
    """Choices of a random number generator."""
    dice = random.Random(seed)  # noqa: S311  # it has to repeat, not to be secret
    return lambda options: options[dice.randrange(len(options))]


def random_programs(capabilities: TestedPatterns, examples: int, seed: int) -> Iterator[Program]:
    """Compositions that Hypothesis chooses; equal seeds give equal programs.

    Raises `Quant2eError` where Hypothesis is not installed.
    """
    try:
        import hypothesis
        from hypothesis import strategies as st
    except ImportError as error:
        raise Quant2eError(
            "graphs for a quantizer are composed by Hypothesis, which is not installed: "
            "pip install quant2e[conformance]"
        ) from error

    found: list[Program] = []

    @st.composite
    def programs(draw: Any) -> Program | None:
        return composition(capabilities, lambda options: draw(st.sampled_from(list(options))))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(programs())
    def collect(program: Program | None) -> None:
        if program is not None:
            found.append(program)

    collect()
    yield from found
