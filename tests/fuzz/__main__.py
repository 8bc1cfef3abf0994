"""The long run of the fuzzer: ``python -m tests.fuzz --minutes 60 [--seed N] [--out FILE] [--lowered]``.

Programs of all quantizers in turn, each with every oracle, until the time is over. Counts go to the screen and to FILE;
each failure is made smaller and printed as text, which becomes a row of ``cases.py``. The exit status is the number of
kinds of failures.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

from quant2e.passes.runner import checking
from tests.fuzz.examine import Failure, examine, smallest
from tests.fuzz.generate import programs
from tests.fuzz.oracles import ALWAYS, IN_TURN, LOWERED, Oracle
from tests.fuzz.program import FuzzProgram
from tests.fuzz.run import RefusedError
from tests.fuzz.settings import SETTINGS
from tests.pass_checks import watch

CHUNK = 40
"""Programs that are drawn at once."""

EVERY = 17
"""One program of so many goes through a runtime: it takes as long as ten programs do. No factor of `CHUNK`."""

TURNS = ("onnx", "executorch", "onnx", "executorch", "inductor")

SHOWN = 3
"""So many failures of one oracle are made smaller and printed; of the others there are counts."""


class Campaign:
    """Counts of a run while it goes on."""

    def __init__(self, seed: int) -> None:
        self.seed, self.began = seed, time.monotonic()
        self.programs: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.oracles: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.ops: Counter[str] = Counter()
        self.found: list[str] = []

    def examine(self, program: FuzzProgram, setting: str, number: int) -> None:
        """One program with the oracles whose turn it is, and where it is that number's turn through a runtime."""
        turn, offset = divmod(number, EVERY)
        lowered = [LOWERED[TURNS[turn % len(TURNS)]]] if offset == EVERY - 1 else []
        oracles = (*ALWAYS, *IN_TURN[number % len(IN_TURN)], *lowered)
        try:
            failures = examine(program, setting, oracles, number)
        except RefusedError as error:
            self.refused[str(error)] += 1
            return
        self.programs[setting] += 1
        self.oracles.update(oracle.__name__ for oracle in oracles)
        self.ops.update(step.name for step in program.steps)
        for failure in failures:
            self.failures[failure.oracle] += 1
            if self.failures[failure.oracle] <= SHOWN:
                self.show(program, failure, setting, number, oracles)

    def show(
        self, program: FuzzProgram, failure: Failure, setting: str, number: int, oracles: tuple[Oracle, ...]
    ) -> None:
        """Make a failing program smaller, and print it."""
        smaller, again = smallest(program, failure, setting, oracles, number)
        text = f"{again}\nsetting {setting}, seed {number}\n{smaller}\n"
        self.found.append(text)
        print(f"\nFAILED {text}", flush=True)

    def text(self) -> str:
        """The counts, as a page."""

        def table(head: str, counts: Counter[str]) -> list[str]:
            return [
                f"| {head} | count |",
                "|---|---|",
                *(f"| {name} | {count} |" for name, count in counts.most_common()),
                "",
            ]

        minutes = (time.monotonic() - self.began) / 60
        lines = [
            (
                f"{sum(self.programs.values())} programs of {len(self.ops)} ops and functions in {minutes:.1f} "
                f"minutes, seed {self.seed}; {sum(self.refused.values())} more were refused, with a reason. "
                f"{sum(self.failures.values())} failures."
            ),
            "",
            *table("quantizer", self.programs),
            *table("oracle", self.oracles),
            *table("failed oracle", self.failures),
            *table(
                "refused because", Counter({reason.replace("|", "/"): n for reason, n in self.refused.most_common(12)})
            ),
            *table("op", self.ops),
        ]
        return "\n".join([*lines, *(f"```\n{text}```\n" for text in self.found)])


def main() -> int:
    """Run for as long as was asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1, help="equal seeds give equal programs")
    parser.add_argument("--out", type=Path, help="where the counts are written, as markdown")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    campaign, number, round_ = Campaign(asked.seed), 0, 0
    until = time.monotonic() + 60 * asked.minutes
    while time.monotonic() < until:
        setting = asked.settings[round_ % len(asked.settings)]
        for program in programs(SETTINGS[setting](), CHUNK, 1000 * asked.seed + round_):
            if time.monotonic() >= until:
                break
            with checking(watch):
                campaign.examine(program, setting, number)
            number += 1
        round_ += 1
        print(f"{campaign.text().splitlines()[0]}", flush=True)
        if asked.out is not None:
            asked.out.write_text(campaign.text(), encoding="utf-8")
    print(campaign.text())
    return len(campaign.failures)


if __name__ == "__main__":
    sys.exit(main())
