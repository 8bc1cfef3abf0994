"""Capabilities of a composition: the union of its children's, in order of precedence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Declared = Mapping[str, Sequence[str]]
"""What one quantizer declares: rule → the patterns it quantizes."""


@dataclass(frozen=True, slots=True)
class Capability:
    """One pattern that one quantizer of a composition quantizes.

    ``after``: the quantizers that take the same pattern first, where their settings cover it.
    """

    quantizer: str
    rule: str
    pattern: str
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Capabilities(Mapping[str, Declared]):
    """Quantizer → rule → patterns, in order of precedence. Printed, it is a table of its ``rows``.

    ``silent``: quantizers that do not declare what they can do.
    """

    declared: Mapping[str, Declared]
    silent: tuple[str, ...] = ()
    rows: tuple[Capability, ...] = field(init=False)

    def __post_init__(self) -> None:
        rows: list[Capability] = []
        for name, rules in self.declared.items():
            first = {(row.pattern, row.quantizer): None for row in rows}
            for rule, patterns in rules.items():
                for pattern in patterns:
                    after = tuple(other for known, other in first if known == pattern)
                    rows.append(Capability(name, rule, pattern, after))
        object.__setattr__(self, "rows", tuple(rows))

    def __getitem__(self, quantizer: str) -> Declared:
        return self.declared[quantizer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.declared)

    def __len__(self) -> int:
        return len(self.declared)

    def __str__(self) -> str:
        head = ("", "quantizer", "rule", "pattern", "unless taken by")
        ranks = {name: str(rank) for rank, name in enumerate(self.declared, start=1)}
        rows = ((ranks[r.quantizer], r.quantizer, r.rule, _short(r.pattern), ", ".join(r.after)) for r in self.rows)
        lines = [head, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*table, *(f"{name} does not tell what it quantizes" for name in self.silent)])


def _short(pattern: str, width: int = 72) -> str:
    return pattern if len(pattern) <= width else f"{pattern[: width - 1]}…"


def declared_by(quantizer: Any) -> Declared | Capabilities | None:
    """What a quantizer says that it can quantize; None for one that does not say.

    Of PT2E's quantizers, which answer ``get_supported_operators()``, the operators of all configurations.
    """
    if callable(ask := getattr(quantizer, "quantization_capabilities", None)):
        declared: Declared | Capabilities = ask()
        return declared
    if not callable(ask := getattr(quantizer, "get_supported_operators", None)):
        return None
    patterns = {
        " + ".join(str(getattr(part, "__name__", part)) for part in pattern): None
        for _, operators in ask()
        for pattern in operators
    }
    return {"supported operators": tuple(patterns)}
