"""Reviews: what differs between two descriptions, as text that is read from top to bottom; like changes in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_NAMED = 4


def change_of(old: float, new: float) -> str:
    """``0.5 -> 0.55 (+10 %)``; factors from two on, ``0.5 -> 2 (×4)``."""
    text = f"{old:.6g} -> {new:.6g}"
    if isinstance(old, int) and isinstance(new, int):
        return text
    if not old:
        return text
    ratio = new / old
    if ratio >= 2:
        return f"{text} (×{ratio:.3g})"
    if 0 < ratio <= 0.5:
        return f"{text} (÷{1 / ratio:.3g})"
    return f"{text} ({100 * (ratio - 1):+.2g} %)"


def review(title: str, sections: Sequence[tuple[str, Iterable[tuple[str, str]]]]) -> str:
    """``title``, then each section that has something: a mark, and lines of what (names) with what is said of it.

    ``sections``: the heading of each and its pairs of a name and words about it; names with the same words share a
    line.
    """
    lines = []
    for heading, pairs in sections:
        said: dict[str, list[str]] = {}
        for name, words in pairs:
            said.setdefault(words, []).append(name)
        if said:
            count = sum(map(len, said.values()))
            lines.append(f"{heading} ({count}):")
            lines += [f"  {_names(names)}{': ' if words else ''}{words}" for words, names in said.items()]
    return "\n".join([title, *(lines or ["no difference"])])


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
