"""Differences by design: which of the peers' tests fail, and why that is no bug of ours (`differences.toml`)."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from tests.peers.suites import Outcome

FILE = Path(__file__).with_name("differences.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """``tests``: patterns of "file::class::test", of which a test has to end with one; ``says``: regular expression
    that the failure has to show, so that the same test failing for another reason is not covered."""

    what: str
    why: str
    tests: tuple[str, ...]
    says: str

    def covers(self, outcome: Outcome) -> bool:
        """Whether it explains a failure."""
        named = any(fnmatchcase(outcome.test, f"*{pattern}") for pattern in self.tests)
        return named and re.search(self.says, outcome.message) is not None


def read(path: Path = FILE) -> tuple[Difference, ...]:
    """All of them, in the order in which they are listed."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["difference"]
    return tuple(Difference(**{**row, "tests": tuple(row["tests"])}) for row in rows)


def explained(
    outcomes: Sequence[Outcome], differences: Sequence[Difference]
) -> tuple[dict[Difference, list[Outcome]], list[Outcome]]:
    """The failures of each difference that has any, and those that none covers."""
    found: dict[Difference, list[Outcome]] = {}
    left = []
    for outcome in outcomes:
        if outcome.kind != "failed":
            continue
        reason = next((difference for difference in differences if difference.covers(outcome)), None)
        if reason is None:
            left.append(outcome)
        else:
            found.setdefault(reason, []).append(outcome)
    return found, left
