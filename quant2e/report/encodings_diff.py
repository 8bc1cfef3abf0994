"""The difference of two records of encodings, as a review: what became float, what moved and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quant2e.documents.review import change_of, review
from quant2e.report.encodings import Encodings, GroupEncoding


def encodings_diff(old: Encodings, new: Encodings) -> str:
    """What was removed, added, became another kind, and which numbers changed, by how much; like changes together."""
    pairs, removed, added = _paired(old, new)
    kinds, numbers, shares = [], [], []
    for before, after in pairs:
        name = _name(after)
        if gone := sorted(set(before.points) - set(after.points)):
            shares.append((name, f"no longer shares with {', '.join(gone[:3])}"))
        if come := sorted(set(after.points) - set(before.points)):
            shares.append((name, f"now shares with {', '.join(come[:3])}"))
        if _kind(before) != _kind(after):
            kinds.append((name, f"{_kind(before)} -> {_kind(after)}"))
        elif words := ", ".join(_changes(before, after)):
            numbers.append((name, words))
    by = f" by {old.quantizer} -> {new.quantizer}" if old.quantizer != new.quantizer else ""
    return review(
        f"encodings{by}: {len(old.groups)} -> {len(new.groups)} groups of points",
        [
            ("removed", [(_name(group), _kind(group)) for group in removed]),
            ("added", [(_name(group), _kind(group)) for group in added]),
            ("other kind", kinds),
            ("other numbers", numbers),
            ("other shares", shares),
        ],
    )


def _paired(
    old: Encodings, new: Encodings
) -> tuple[list[tuple[GroupEncoding, GroupEncoding]], list[GroupEncoding], list[GroupEncoding]]:
    """Groups that have a point in common, the first of each; those of the first record alone; of the second alone."""
    known = {point: index for index, group in enumerate(old.groups) for point in group.points}
    free = set(range(len(old.groups)))
    pairs, added = [], []
    for group in new.groups:
        index = next((known[point] for point in group.points if known.get(point) in free), None)
        if index is None:
            added.append(group)
            continue
        free.discard(index)
        pairs.append((old.groups[index], group))
    return pairs, [old.groups[index] for index in sorted(free)], added


def _name(group: GroupEncoding) -> str:
    more = f" (+{len(group.points) - 1})" if len(group.points) > 1 else ""
    return f"({group.points[0] if group.points else ''}){more}"


def _kind(group: GroupEncoding) -> str:
    """Encoding, dtype and range, axis, size of groups: all but the numbers that calibration finds."""
    parts = [group.encoding]
    if group.encoding in ("float", "float16", "custom", "on_grid"):
        return parts[0]
    parts.append(f"{group.dtype}[{group.quant_min}, {group.quant_max}]")
    parts += [f"axis {group.axis}"] if group.axis is not None else []
    parts += [f"groups of {group.group_size}"] if group.group_size else []
    parts += [f"for each {group.granularity}"] if group.granularity else []
    parts += ["symmetric"] if group.symmetric else []
    return " ".join(parts)


def _changes(before: GroupEncoding, after: GroupEncoding) -> Iterator[str]:
    if before.scale != after.scale:
        yield from _moved("scale", before.scale, after.scale)
    if before.zero_point != after.zero_point:
        yield from _moved("zero point", before.zero_point, after.zero_point)
    if before.eps != after.eps:
        yield f"smallest scale {change_of(before.eps, after.eps)}"


def _moved(what: str, old: Sequence[float], new: Sequence[float]) -> Iterator[str]:
    """One number, or how many of several changed and the one that changed most."""
    if len(old) != len(new):
        yield f"{len(old)} -> {len(new)} {what}s"
        return
    if len(old) == 1:
        yield f"{what} {change_of(old[0], new[0])}"
        return
    moved = [index for index, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    most = max(moved, key=lambda index: _distance(old[index], new[index]))
    yield f"{len(moved)} of {len(old)} {what}s, most in number {most}: {change_of(old[most], new[most])}"


def _distance(a: float, b: float) -> float:
    """How far two numbers are apart, whichever is larger: as a factor where both are positive."""
    return max(a / b, b / a) if a > 0 and b > 0 else abs(a - b)
