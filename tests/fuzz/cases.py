"""What was found wrong, as programs that ``python -m tests.fuzz`` printed: a row fails when its fault comes back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """``program``: as the fuzzer printed it, with the setting and the seed that it named; ``oracle``: what failed."""

    name: str
    oracle: str
    setting: str
    seed: int
    program: str


CASES: tuple[Case, ...] = (
    Case(
        "an op whose result nothing reads kept a convolution and its relu apart",
        "dead_code",
        "xnnpack",
        24,
        """
        x0: float32[2, 4, 8, 8] normal
        v0 = conv2d.padding(x0, weight[4, 1, 2, 2], None, [1, 1], 'same', [1, 1], 4)
        v1 = relu.default(v0)
        return v1
        """,
    ),
    Case(
        "observers that are on learn from what is evaluated, which the oracle has to leave out",
        "training",
        "xnnpack",
        3,
        """
        x0: float32[1, 3, 17] normal
        x1: float32[1, 1, 1] normal
        v0 = add.Tensor(x0, x1)
        return v0
        """,
    ),
)
