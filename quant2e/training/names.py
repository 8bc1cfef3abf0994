"""Names by pattern: exact, glob or regular expression; one that names nothing is an error with the nearest name."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable

from quant2e.errors import Quant2eError


def select_names(names: Iterable[str], pattern: str | re.Pattern[str], kind: str = "parameter") -> list[str]:
    """Those of ``names``, in their order, that ``pattern`` names.

    A pattern is a name, a glob (``*``, ``?`` and ``[…]``, which match dots as well), or, behind ``re:`` or compiled, a
    regular expression for the whole name. ``kind`` is what errors call a name.
    Raises `Quant2eError` for a pattern that is no regular expression, or that names nothing.
    """
    known = list(names)
    expression = pattern if isinstance(pattern, re.Pattern) else _expression(pattern)
    found = [pattern] if pattern in known else [name for name in known if expression.fullmatch(name)]
    if found:
        return [str(name) for name in found]
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    near = difflib.get_close_matches(text.removeprefix("re:"), known, n=1, cutoff=0.0)
    hint = f"the nearest is '{near[0]}'" if near else "there is none at all"
    raise Quant2eError(f"'{text}' names no {kind}; {hint}")


def _expression(pattern: str) -> re.Pattern[str]:
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern))
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise Quant2eError(f"'{pattern}' is no regular expression: {error}") from error
