"""Examination of a program: its run, the oracles, and the smallest program that fails as it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantizers.conformance.program_builder import shapes_of
from tests.fuzz.oracles import Oracle, purity
from tests.fuzz.program import FuzzProgram
from tests.fuzz.run import RefusedError, Run


@dataclass(frozen=True, slots=True)
class Failure:
    """An oracle that does not hold."""

    oracle: str
    message: str

    def __str__(self) -> str:
        return f"{self.oracle}: {self.message}"


def examine(program: FuzzProgram, setting: str, oracles: Sequence[Oracle], seed: int = 0) -> list[Failure]:
    """What does not hold. Raises `RefusedError` for a program that cannot be judged."""
    random = torch.get_rng_state()
    run = Run(program, setting, seed)
    try:
        run.go()
    except RefusedError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever it is
        return [Failure("raises", f"{run.stage}: {type(error).__name__}: {error}")]
    failures: list[Failure] = []
    for oracle in (*oracles, purity):
        try:
            failures += [Failure(oracle.__name__, message) for message in oracle(run)]
        except Exception as error:  # noqa: BLE001
            failures.append(Failure(oracle.__name__, f"{type(error).__name__}: {error}"))
    if not torch.equal(random, torch.get_rng_state()):
        failures.append(Failure("purity", "the random stream of the process moved"))
    return failures


def smallest(
    program: FuzzProgram, failure: Failure, setting: str, oracles: Sequence[Oracle], seed: int, tries: int = 40
) -> tuple[FuzzProgram, Failure]:
    """The smallest program that was found to fail as well: steps are left out as long as it does."""
    wanted = [o for o in (*oracles, purity) if o.__name__ == failure.oracle]
    shrinking = True
    while shrinking and tries > 0:
        shrinking = False
        for smaller in program.smaller(shapes_of(program)):
            tries -= 1
            if tries < 0:
                break
            try:
                again = [f for f in examine(smaller, setting, wanted, seed) if f.oracle == failure.oracle]
            except Exception:  # noqa: BLE001  # a program that lost too much to run
                continue
            if again:
                program, failure, shrinking = smaller, again[0], True
                break
    return program, failure
