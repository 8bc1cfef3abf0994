"""Programs out of pieces: one piece at a time for coverage, and random compositions.

Compositions share inputs and results, use one tensor twice, return what is also used, start at inputs and end at
outputs; some read integers and masks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from quant2e.annotation.pattern import arguments
from quantizers.conformance.capabilities import AROUND, Capabilities, Piece
from quantizers.conformance.op_calls import build
from quantizers.conformance.program import Program
from quantizers.conformance.program_builder import Draft, UnfitError

aten = torch.ops.aten

Choose = Callable[[Sequence[Any]], Any]


def single(piece: Piece, capabilities: Capabilities, choose: Choose) -> Program | None:
    """One piece; between others, where it only follows what is quantized. None where it could not be written."""
    draft = Draft(choose)
    others = [p for p in capabilities.pieces if not p.follows and p.rule] if piece.follows else []
    if others:
        _grow(draft, choose(others))
    grown = (piece.follows and _continue(draft, piece)) or any(_grow(draft, piece) for _ in range(6))
    if others and choose([True, False]):
        readers = [choose(others) for _ in range(4)]  # a rule may ask for what reads its result
        if not grown or not any(_continue(draft, after) for after in readers):
            _grow(draft, readers[0])
    return draft.finish()[0] if grown and draft.size else None


def composition(capabilities: Capabilities, choose: Choose) -> Program | None:
    """Up to five pieces, some ops around them, some integers. None where nothing could be written."""
    draft = Draft(choose)
    for _ in range(choose([2, 3, 1, 4, 5])):
        _grow(draft, choose(capabilities.pieces))
        if choose([False, False, True]):
            _grow(draft, Piece(choose(AROUND)))
    oddity = choose([None, None, *ODDITIES])
    if oddity is not None:
        _add(draft, oddity)
    if not draft.size:
        return None
    known = draft.floats()
    extra = [choose(known)] if known and choose([False, False, True]) else []
    return draft.finish(extra)[0]


def odd(oddity: Callable[[Draft], None], capabilities: Capabilities, choose: Choose) -> Program | None:
    """One of the `ODDITIES`, behind a piece. None where it could not be written."""
    draft = Draft(choose)
    _grow(draft, choose(capabilities.pieces))
    return draft.finish()[0] if _add(draft, oddity) else None


def _grow(draft: Draft, piece: Piece) -> bool:
    return _add(draft, lambda draft: build(draft, piece.pattern, {}))


def _continue(draft: Draft, piece: Piece) -> bool:
    """The piece on the latest result; not where it does not fit."""
    latest = draft.floats()[:1]
    names = [name for name, arg in arguments(piece.pattern).items() if not arg.constant]
    return bool(latest) and any(
        _add(draft, lambda d: build(d, piece.pattern, dict.fromkeys(names, latest[0]))) for _ in range(4)
    )


def _add(draft: Draft, write: Callable[[Draft], Any]) -> bool:
    """Whether it could be written; the draft is as before where it could not."""
    state = draft.state()
    try:
        write(draft)
    except UnfitError:
        draft.back_to(state)
        return False
    return True


def _masked(draft: Draft) -> None:
    """Scores with a mask of integers added: ``x + (1 - mask) * -1e9``."""
    x = draft.pick(rank=3)
    mask = draft.input(draft.shape(x), 2)
    wide = draft.call(aten._to_copy.default, mask, dtype=torch.float32)
    away = draft.call(aten.mul.Tensor, draft.call(aten.rsub.Scalar, wide, 1.0), -1e9)
    draft.call(aten.softmax.int, draft.call(aten.add.Tensor, x, away), -1)


def _indexed(draft: Draft) -> None:
    """Rows picked by an index that is computed from data. It comes out as zero, whichever value rounding makes the largest."""
    x = draft.pick(rank=2)
    best = draft.call(aten.argmax.default, x, -1)
    rows = draft.call(aten.remainder.Scalar, best, 1)
    draft.call(aten.relu.default, draft.call(aten.index_select.default, x, 0, rows))


def _counted(draft: Draft) -> None:
    """Integers that meet floats: ``x * mask`` of an integer input, whose own sum is added up in integers."""
    x = draft.pick(rank=2)
    count = draft.input(draft.shape(x), 3)
    twice = draft.call(aten.add.Tensor, count, count)
    joined = draft.call(aten.cat.default, [count, twice], 0)
    draft.call(aten.view.default, joined, [-1])
    draft.call(aten.mul.Tensor, x, count)


ODDITIES: tuple[Callable[[Draft], None], ...] = (_masked, _indexed, _counted)
"""Integers and masks, which no quantizer may touch."""


def by_dice(seed: int) -> Choose:
    """Choices of a random number generator."""
    dice = random.Random(seed)  # noqa: S311  # it has to repeat, not to be secret
    return lambda options: options[dice.randrange(len(options))]


def random_programs(capabilities: Capabilities, examples: int, seed: int) -> Iterator[Program]:
    """Compositions that Hypothesis chooses. Equal seeds give equal programs. Raises ImportError without Hypothesis."""
    import hypothesis
    from hypothesis import strategies as st

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
