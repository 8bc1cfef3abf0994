"""Summaries: what a console or a notebook shows of a report.

The headline, then the first notes, a line each, then how many are left. ``str(report)`` is the whole report.
"""

from __future__ import annotations

from collections.abc import Sequence

NOTES_SHOWN = 6


def summary(headline: Sequence[str], notes: Sequence[str], kind: str = "note") -> str:
    """Lines of text: ``headline``, of which the first stands out, and `NOTES_SHOWN` of ``notes`` of one ``kind``."""
    shown = [*headline[1:], *(f"{kind}: {note}" for note in notes[:NOTES_SHOWN])]
    if (left := len(notes) - NOTES_SHOWN) > 0:
        shown.append(f"… {left} more {kind}{'s' if left > 1 else ''}")
    return "\n  ".join([*headline[:1], *shown])
