"""The targets: what must hold, what was measured, and whether it does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.accuracy.peers import FLOWS
from benchmarks.accuracy.row import ALIKE, FLOAT, MENDED, NNCF, PLAIN, TORCHAO, Row
from benchmarks.accuracy.schemes import W4, W4_ASYMMETRIC, X86, XNNPACK
from benchmarks.accuracy.tuning import Tuned
from quant2e.accuracy.algorithms.ladder import ENOUGH_DB

POINTS = 0.005
"""Half a point of a share."""
LEAST_SHARE = 0.95
"""Of the multiply-accumulates."""

Rows = Mapping[tuple[str, str, str], Row]


@dataclass(frozen=True, slots=True)
class Target:
    """``wanted`` and ``found``, in words; ``met``: None where it was not measured."""

    what: str
    wanted: str
    found: str
    met: bool | None

    @property
    def verdict(self) -> str:
        """One word or two."""
        return {True: "met", False: "**not met**", None: "not measured"}[self.met]


def targets(rows: Sequence[Row], tuned: Sequence[Tuned]) -> Iterator[Target]:
    """All of them, in the order of the issue."""
    by_key = {row.key: row for row in rows}
    for model, scheme in (
        ("depthwise, hard", XNNPACK),
        ("depthwise, hard", X86),
        ("vit, hard", XNNPACK),
        ("vit, hard", X86),
    ):
        yield _as_float(by_key, model, scheme)
    yield _sentences(by_key, X86, cosine=0.997, top1=0.95)
    yield _sentences(by_key, XNNPACK, cosine=0.99)
    for model, measure in (("characters", "−bits"), ("minilm", "cosine")):
        yield _four_bits(by_key, model, measure)
    yield from map(_tuned, tuned)
    yield from _peers(by_key)


def _missing(what: str, wanted: str, *needed: Row | None) -> Target | None:
    for row in needed:
        if row is not None and row.failed:
            return Target(what, wanted, row.failed, met=False)
    return Target(what, wanted, "", None) if any(row is None for row in needed) else None


def _as_float(rows: Rows, model: str, scheme: str) -> Target:
    what, wanted = f"{model}, {scheme}", "within 0.5 points of float, ≥ 95 % of MACs; plain loses more than 10 points"
    exact, plain, mended = (rows.get((model, scheme, method)) for method in (FLOAT, PLAIN, MENDED))
    missing = _missing(what, wanted, exact, plain, mended)
    if missing is not None or exact is None or plain is None or mended is None:
        return missing or Target(what, wanted, "", None)
    found = f"{mended.metric:.2%} at {mended.int8_share:.1%}; float {exact.metric:.2%}, plain {plain.metric:.2%}"
    near, hard = mended.metric >= exact.metric - POINTS, plain.metric < exact.metric - 0.1
    return Target(what, wanted, found, near and hard and mended.int8_share >= LEAST_SHARE)


def _sentences(rows: Rows, scheme: str, *, cosine: float, top1: float = 0.0) -> Target:
    also = f", top-1 ≥ {top1:g}, ≥ 95 % of MACs" if top1 else ""
    what, wanted = f"minilm, {scheme}", f"cosine ≥ {cosine:g}{also}"
    row = rows.get(("minilm", scheme, MENDED))
    missing = _missing(what, wanted, row)
    if missing is not None or row is None:
        return missing or Target(what, wanted, "", None)
    got = row.measures
    found = f"cosine {got['cosine']:.4f}, top-1 {got['top-1']:.3f} at {row.int8_share:.1%}"
    enough = got["cosine"] >= cosine and got["top-1"] >= top1
    return Target(what, wanted, found, enough and (not top1 or row.int8_share >= LEAST_SHARE))


def _four_bits(rows: Rows, model: str, measure: str) -> Target:
    """The share of the loss that GPTQ recovers, where round-to-nearest loses something; the better of both forms."""
    what, wanted = f"{model}, w4 in groups of 32", "GPTQ recovers at least half of what round-to-nearest loses"
    parts, best = [], -math.inf
    for scheme, name in ((W4, "symmetric"), (W4_ASYMMETRIC, "asymmetric")):
        exact, plain, mended = (rows.get((model, scheme, method)) for method in (FLOAT, PLAIN, MENDED))
        missing = _missing(what, wanted, exact, plain, mended)
        if missing is not None or exact is None or plain is None or mended is None:
            return missing or Target(what, wanted, "", None)
        lost = exact.measures[measure] - plain.measures[measure]
        kept = 1 - (exact.measures[measure] - mended.measures[measure]) / lost if lost > 0 else math.nan
        parts.append(f"{name} {kept:.0%} of {lost:.4f} {measure.strip('−')}")
        best = max(best, kept)
    return Target(what, wanted, "; ".join(parts), best >= 0.5)


def _tuned(one: Tuned) -> Target:
    what, wanted = f"tune, {one.model}, {one.scheme}", "0.5 % kept, int8 share within 5 points of exhaustive search"
    found = (
        f"{one.metric:.2%} of float's {one.float_metric:.2%}, {one.int8_share:.1%} on int8 in {one.trials} trials; "
        f"exhaustive {one.exhaustive_share:.1%} over {len(one.blocks)} blocks"
    )
    return Target(what, wanted, found, one.met and one.int8_share >= one.exhaustive_share - 0.05)


def _peers(rows: Rows) -> Iterator[Target]:
    """Ours with algorithms beside each peer, on each model and scheme that the peer ran on; with the same ranges."""
    for (model, scheme, method), peer in rows.items():
        exact, safe = rows.get((model, scheme, FLOAT)), rows.get((model, scheme, MENDED))
        ours = (rows.get((model, scheme, ALIKE)) or safe) if method in {NNCF, TORCHAO} else safe
        if method not in FLOWS or exact is None or peer.failed or ours is None or ours.failed:
            continue
        found = _at(ours)
        if ours is not safe and safe is not None and not safe.failed:
            found += f", and with tables and ranges for the machine of its row {_at(safe)}"
        found += f"; {method} {_at(peer)}"
        if ours.metric < peer.metric:
            found += f": {_behind(ours, peer, exact)}"
        better = ours.metric >= peer.metric and ours.int8_share >= peer.int8_share - 1e-6
        yield Target(f"{model}, {scheme}, beside {method}", _BESIDE, found, better)


_BESIDE = "at least as accurate, at no smaller int8 share"


def _at(row: Row) -> str:
    return f"{row.metric:.2%} at {row.int8_share:.1%}"


def _behind(ours: Row, peer: Row, exact: Row) -> str:
    """By how much, in samples where the metric is a share of them, and why that may be."""
    lost = peer.metric - ours.metric
    amount = f"{round(lost * ours.samples)} of {ours.samples:,}" if ours.samples else f"{lost:.4f}"
    if ours.metric >= exact.metric:
        return f"behind by {amount}, with all of float's {exact.metric:.2%}: what a model has above float is chance"
    stopped = any("dB are enough" in note for note in ours.notes)
    more = f'; "auto" stops at {ENOUGH_DB:g} dB, steps asked for by name do not' if stopped else ""
    return f"behind by {amount}; float {exact.metric:.2%}{more}"
