"""The nearest of the names that there are, for messages about one that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 8


def nearest(wanted: str, known: Iterable[str]) -> str:
    """``; did you mean 'a'?``, or ``; there is 'a', 'b' …`` where none is close; empty where there is nothing."""
    names = sorted({name for name in known if name})
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {', '.join(map(repr, close))}?"
    return f"; there is {', '.join(map(repr, names[:_SHOWN]))}{' …' * (len(names) > _SHOWN)}" if names else ""
