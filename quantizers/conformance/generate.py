"""Programs out of pieces: one piece at a time for coverage, and random compositions.

Compositions share inputs and results, use one tensor twice, return what is also used, start at inputs and end at
outputs; some read integers and masks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from quantizers.conformance.blocks import build
from quantizers.conformance.capabilities import AROUND, Capabilities, Piece
from quantizers.conformance.draft import Draft, UnfitError
from quantizers.conformance.program import Program

aten = torch.ops.aten

Choose = Callable[[Sequence[Any]], Any]


def single(piece: Piece, capabilities: Capabilities, choose: Choose) -> Program | None:
    """One piece; behind another one, where it only follows what is quantized. None where it could not be written."""
    draft = Draft(choose)
    if piece.follows:
        leading = [p for p in capabilities.pieces if not p.follows and p.rule]
        for _ in range(3 if leading else 0):
            if _grow(draft, choose(leading)) and draft.size > 1:
                break
    grown = any(_grow(draft, piece) for _ in range(6))
    return draft.finish()[0] if grown and draft.size else None


def composition(capabilities: Capabilities, choose: Choose) -> Program | None:
    """Up to five pieces, some ops around them, some integers. None where nothing could be written."""
    draft = Draft(choose)
    for _ in range(choose([2, 3, 1, 4, 5])):
        _grow(draft, choose(capabilities.pieces))
        if choose([False, False, True]):
            _grow(draft, Piece(choose(AROUND)))
    oddity = choose([None, None, _masked, _indexed, _counted])
    if oddity is not None:
        state = draft.state()
        try:
            oddity(draft)
        except UnfitError:
            draft.back_to(state)
    if not draft.size:
        return None
    known = draft.floats()
    extra = [choose(known)] if known and choose([False, False, True]) else []
    return draft.finish(extra)[0]


def _grow(draft: Draft, piece: Piece) -> bool:
    state = draft.state()
    try:
        build(draft, piece.pattern, {})
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
    """Rows picked by an index that is computed from data."""
    x = draft.pick(rank=2)
    best = draft.call(aten.argmax.default, x, -1)
    rows = draft.call(aten.remainder.Scalar, best, draft.shape(x)[0])
    draft.call(aten.relu.default, draft.call(aten.index_select.default, x, 0, rows))


def _counted(draft: Draft) -> None:
    """Integers that meet floats: ``x * mask`` of an integer input, whose own sum is added up in integers."""
    x = draft.pick(rank=2)
    count = draft.input(draft.shape(x), 3)
    twice = draft.call(aten.add.Tensor, count, count)
    joined = draft.call(aten.cat.default, [count, twice], 0)
    draft.call(aten.view.default, joined, [-1])
    draft.call(aten.mul.Tensor, x, count)


def by_dice(seed: int) -> Choose:
    """Choices of a random number generator."""
    dice = random.Random(seed)
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

