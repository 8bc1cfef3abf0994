"""Conformance check: graphs over a quantizer's own capabilities, and a report of what is wrong with it."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from quant2e.annotation.quantizer import Quantizer
from quant2e.errors import AnnotationError
from quant2e.integer.arithmetic.requantization import Requantization
from quantizers.conformance.capabilities import AROUND, TestedPatterns, opt_in_rules, patterns_to_test
from quantizers.conformance.flow_checks import Limits, Outcome, examine
from quantizers.conformance.generate import SPECIAL_INPUTS, by_dice, random_programs, read_by, single, special_input
from quantizers.conformance.program import Program
from quantizers.conformance.program_builder import shapes_of
from quantizers.conformance.report import WARNINGS, Conformance, Finding

ATTEMPTS, FOLLOWING = 8, 24
"""How often a graph for one alternative of a rule is drawn, until the rule applies; of a rule that follows others."""

READERS = tuple(
    replace(around, targets=frozenset({each})) for around in AROUND for each in sorted(around.targets, key=str)
)
READINGS = 2
"""Every op that may read the result of a pattern, by itself, and how often each is tried."""

SHRUNK, TRIES = 2, 30
"""So many findings of one kind get a smaller graph, in so many tries each: examining a graph takes its time."""

CHANCES = {"not deterministic": 3}
"""Kind of finding → how often one graph is examined for it: what comes and goes may be away once."""


def check(
    quantizer: Quantizer | Callable[[], Quantizer],
    *,
    examples: int = 25,
    seed: int = 0,
    seconds: float = 60.0,
    min_sqnr_db: float = 8.0,
    requantization: Requantization | None = "float32",
    strict: bool = False,
) -> Conformance:
    """Run a quantizer through generated graphs, and say what is wrong with it.

    ``quantizer``: an object with PT2E's methods, configured as it will be used, or a class or function that makes one.
    Graphs are composed of its own rules' patterns (`RuleQuantizer`, and compositions of them), or of common ops for a
    quantizer that does not tell. Each goes through annotate, prepare, calibrate, convert and the integer reference.

    ``examples``: random compositions, besides the graphs for each alternative of each rule. ``seed``: equal seeds give
    equal graphs. ``seconds``: no further graph is begun after that. ``min_sqnr_db``: every result's distance from
    float. ``requantization``: arithmetic of the integer reference, None leaves it out; ``strict``: every quantized op
    must have an integer form. Raises `Quant2eError` where Hypothesis, which composes the graphs, is not installed.
    """
    quantizer = _instance(quantizer)
    search = _Search(
        quantizer,
        patterns_to_test(quantizer),
        Limits(min_sqnr_db, requantization, strict, mixes=bool(getattr(quantizer, "quantizers", None))),
        seed,
        time.monotonic() + seconds,
    )
    search.cover_oddities()
    search.cover_rules()
    search.cover_readers()
    search.compose(examples)
    search.judge_rules()
    return search.report()


def _instance(quantizer: Any) -> Quantizer:
    made: Quantizer | None = None
    if callable(getattr(quantizer, "annotate", None)) and not isinstance(quantizer, type):
        made = quantizer
    elif callable(quantizer):
        made = quantizer()
    if made is None or not callable(getattr(made, "annotate", None)):
        raise AnnotationError(f"{quantizer!r} is no quantizer, and makes none: it needs a method annotate(model)")
    return made


class _Search:
    """One check while it runs."""

    def __init__(self, quantizer: Quantizer, known: TestedPatterns, limits: Limits, seed: int, deadline: float) -> None:
        self.quantizer, self.known, self.limits, self.seed, self.deadline = quantizer, known, limits, seed, deadline
        self.examples = 0
        self.complete = True
        self.reached: Counter[str] = Counter(dict.fromkeys(known.rules, 0))
        self.written: Counter[str] = Counter()
        self.refused: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.weighted: dict[tuple[str, str], dict[bool, tuple[str, Program]]] = {}
        self.findings: dict[tuple[str, str, str], Finding] = {}

    def _late(self) -> bool:
        late = time.monotonic() > self.deadline
        self.complete &= not late
        return late

    def cover_rules(self) -> None:
        """Graphs of one pattern, until each rule has applied."""
        for number, tested in enumerate(self.known.patterns):
            for attempt in range(FOLLOWING if tested.follows else ATTEMPTS):
                if self._late() or (attempt and (not tested.rule or self.reached[tested.rule])):
                    break
                program = single(tested, self.known, by_dice(self.seed + 1000 * number + attempt))
                if program is not None:
                    self.written[tested.rule] += 1
                    self.look_at(program)

    def cover_readers(self) -> None:
        """For rules that applied nowhere, graphs in which another op reads the result of their pattern."""
        opt_in = opt_in_rules(self.quantizer)
        for number, tested in enumerate(self.known.patterns):
            for attempt, reader in enumerate(READERS * READINGS):
                if self._late() or not tested.rule or self.reached[tested.rule] or tested.rule in opt_in:
                    break
                program = read_by(tested, reader, by_dice(self.seed + 1000 * number + attempt))
                if program is not None:
                    self.written[tested.rule] += 1
                    self.look_at(program)

    def cover_oddities(self) -> None:
        """Integers and masks, each behind a pattern."""
        for number, special in enumerate(SPECIAL_INPUTS):
            program = None if self._late() else special_input(special, self.known, by_dice(self.seed + number))
            if program is not None:
                self.look_at(program)

    def compose(self, examples: int) -> None:
        """Random compositions."""
        if self._late():
            return
        for program in list(random_programs(self.known, examples, self.seed)):
            if self._late():
                return
            self.look_at(program)

    def look_at(self, program: Program) -> None:
        """Examine a program, and make it smaller where it shows something new."""
        outcome = examine(self.quantizer, program, self.limits, self.seed)
        self.examples += outcome.ran
        self.reached.update(outcome.reached)
        for rule, reasons in outcome.refused.items():
            self.refused[rule].update(reasons)
        for key, ways in outcome.weighted.items():
            for quantized, node in ways.items():
                known = self.weighted.setdefault(key, {})
                if quantized not in known or len(program.steps) < len(known[quantized][1].steps):
                    known[quantized] = node, program
        for finding in outcome.findings:
            if finding.key not in self.findings:
                self.findings[finding.key] = self._smallest(finding, program)

    def _smallest(self, finding: Finding, program: Program) -> Finding:
        """The finding with the smallest program that shows it: steps are left out as long as it stays.

        Not by Hypothesis, which shrinks choices, most of which leave the program as large as it is, and examining one
        takes its time: for three findings of one op it took 103, 22 and 10 programs (108 s, 30 s and 6 s), to 1, 1 and
        3 steps; leaving steps out takes 2, 2 and 1 (below 1 s each), to one.
        """
        smallest, tries = program, 0
        best, shrinking = finding.of(program), sum(f.kind == finding.kind for f in self.findings.values()) < SHRUNK
        while shrinking:
            shrinking = False
            for smaller in smallest.smaller(shapes_of(smallest)):
                tries += 1
                if self._late() or tries > TRIES:
                    break
                if (again := self._again(finding, smaller)) is not None:
                    best, smallest, shrinking = again.of(smaller), smaller, True
                    break
        return best

    def _again(self, finding: Finding, program: Program) -> Finding | None:
        """The finding in another program."""
        chances = (_same_defect(finding, self._try(program)) for _ in range(CHANCES.get(finding.kind, 1)))
        return next((again for again in chances if again is not None), None)

    def _try(self, program: Program) -> Outcome:
        try:
            shapes_of(program)
            return examine(self.quantizer, program, self.limits, self.seed)
        except Exception:  # noqa: BLE001  # a program that lost too much to run
            return Outcome()

    def judge_rules(self) -> None:
        """Rules that never applied; ops that lose their activations now and then."""
        opt_in = opt_in_rules(self.quantizer)
        for rule, why in self.known.unwritten:
            self._add(Finding("not generated", why, rule))
        for rule, count in self.reached.items():
            if count or rule in opt_in or any(rule == name for name, _ in self.known.unwritten):
                continue
            if self.limits.mixes or not self.complete:
                continue
            self._add(Finding("never reached", self._why_never(rule), rule))
        activations = {op for (_, op), ways in self.weighted.items() if True in ways}
        for (rule, op), ways in self.weighted.items():
            if op in activations and set(ways) == {False} and not self.limits.mixes:
                node, program = ways[False]
                message = (
                    "its weight is quantized and its activation is not: it computes in float on a dequantized weight"
                )
                self._add(Finding("isolated", message, rule, node, op, program))

    def _why_never(self, rule: str) -> str:
        tried = f"none of {self.examples} graphs, {self.written[rule]} of them written for it,"
        why = [reason for reason, _ in self.refused[rule].most_common(1)]
        return f"{tried} was annotated by it" + (f"; mostly because {why[0]}" if why else "")

    def _add(self, finding: Finding) -> None:
        warning = finding.kind in WARNINGS
        self.findings.setdefault(finding.key, replace(finding, warning=warning))

    def report(self) -> Conformance:
        """The result, errors first."""
        ordered = sorted(self.findings.values(), key=lambda f: f.warning)
        notes = list(self._notes())
        return Conformance(
            type(self.quantizer).__name__,
            tuple(ordered),
            self.examples,
            dict(self.reached),
            self.seed,
            self.complete,
            tuple(notes),
        )

    def _notes(self) -> Iterator[str]:
        if not self.known.declared:
            yield "it does not declare all its rules: graphs are made of ops in common use"
        if not self.complete:
            yield f"stopped by the time limit after {self.examples} graphs: rules that nothing reached are not reported"


def _same_defect(finding: Finding, outcome: Outcome) -> Finding | None:
    """The same defect among the findings. Of what differs between two runs, either may come first, with any op."""
    chance = finding.kind in CHANCES
    return next((f for f in outcome.findings if f.key == finding.key or (chance and f.kind == finding.kind)), None)
