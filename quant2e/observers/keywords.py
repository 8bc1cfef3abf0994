"""Keywords of observers: which arguments a class takes, and the nearest of them for one that it does not.

Observers hand ``**options`` on to their bases, so a misspelt argument would be ignored, and the default stand. Every
class is asked for the keywords that it takes, and each of its instances is checked against them as it is made.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from quant2e.errors import AnnotationError


def check_keywords(make: Any, given: Mapping[str, Any], positional: Sequence[Any] = ()) -> None:
    """Raise `AnnotationError` for a keyword in ``given`` that ``make``, a class, does not take.

    Nothing is known of classes that take any keyword: what they hand on is checked where it arrives.
    """
    named = dict(zip(_signature(make)[0], positional, strict=False)) if positional else {}
    known = keywords_of(make, {**named, **given})
    unknown = next((keyword for keyword in given if known is not None and keyword not in known), None)
    if known is not None and unknown is not None:
        near = difflib.get_close_matches(unknown, sorted(known), n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        name = getattr(make, "__name__", str(make))
        raise AnnotationError(f"{name} takes no argument '{unknown}'; {hint}it takes {', '.join(sorted(known))}")


def check_when_made(kind: type[Any]) -> None:
    """Let ``kind``, which may have a constructor of its own, check its keywords before that runs."""
    if "__init__" not in vars(kind):
        return
    initialise = vars(kind)["__init__"]

    @functools.wraps(initialise)
    def checked(self: Any, *args: Any, **keywords: Any) -> None:
        check_keywords(kind, keywords, args)
        initialise(self, *args, **keywords)

    kind.__init__ = checked


def keywords_of(make: Any, given: Mapping[str, Any]) -> frozenset[str] | None:
    """The keyword arguments that a class takes; None where that is not known.

    A class that takes any keyword, and an ``observer`` among those it names, hands the rest on to that observer.
    """
    partial = getattr(make, "p", make)  # of a factory
    kind = getattr(partial, "func", partial)
    if not isinstance(kind, type):
        return None
    named, closed, inner = _signature(kind)
    own = frozenset(named)
    if closed:
        return own
    inner = given.get("observer", getattr(partial, "keywords", {}).get("observer", inner))
    handed_on = keywords_of(inner, {}) if inner is not None else None
    return None if handed_on is None else own | handed_on


@functools.cache
def _signature(kind: type[Any]) -> tuple[tuple[str, ...], bool, Any]:
    """Keywords that a class names, in order; whether these are all; and the default of its argument ``observer``."""
    initialiser: Any = kind.__init__
    _, *parameters = inspect.signature(initialiser).parameters.values()
    names = tuple(parameter.name for parameter in parameters if parameter.kind in _NAMED)
    inner = next((p.default for p in parameters if p.name == "observer" and p.default is not p.empty), None)
    rest = next((p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    if rest is None:
        return names, True, inner
    try:
        listed = typing.get_args(typing.get_type_hints(initialiser).get(rest.name))
    except NameError:  # hints that only type checkers can read
        listed = ()
    if listed and typing.is_typeddict(listed[0]):
        return (*names, *listed[0].__annotations__), True, inner
    return names, False, inner


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
