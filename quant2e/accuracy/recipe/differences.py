"""The difference of two recipes, as a review."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quant2e.accuracy.recipe.settings import NAMES
from quant2e.documents.review import change_of, review

Data = Mapping[str, Any]


def recipe_difference(old: Data, new: Data) -> str:
    """What the plain data of one recipe changes in that of another: rules are the same that name the same ops."""
    removed, added, changed = [], [], []
    for part, name_of in (("rules", _rule), ("tensors", lambda row: f"tensor '{row['tensor']}'")):
        before, after = ({name: row for row in rows.get(part, ()) for name in [name_of(row)]} for rows in (old, new))
        removed += [(name, _said(row)) for name, row in before.items() if name not in after]
        added += [(name, _said(row)) for name, row in after.items() if name not in before]
        both = [name for name in after if name in before]
        changed += [(name, words) for name in both if (words := "; ".join(_changes(before[name], after[name])))]
        if both != [name for name in before if name in after]:
            changed.append((f"order of {part}", " < ".join(both)))
    for part in ("default", "algorithms", "description", "imports"):
        if words := "; ".join(_changes({part: old.get(part)}, {part: new.get(part)})):
            changed.append(("the recipe", words))
    count = f"{len(old.get('rules', ()))} -> {len(new.get('rules', ()))} rules"
    return review(f"recipe: {count}", [("removed", removed), ("added", added), ("changed", changed)])


def _rule(row: Data) -> str:
    return " and ".join(f"{name} '{row[name]}'" for name in NAMES if name in row)


def _said(row: Data) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in row.items() if key not in (*NAMES, "tensor"))


def _changes(old: Data, new: Data, path: str = "") -> Iterator[str]:
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        name = f"{path}{key}"
        if before == after and type(before) is type(after):
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(before, after, f"{name}.")
        elif isinstance(before, int | float) and isinstance(after, int | float) and not _flags(before, after):
            yield f"{name} {change_of(before, after)}"
        else:
            yield f"{name} {_text(before)} -> {_text(after)}"


def _flags(*values: Any) -> bool:
    return any(isinstance(value, bool) for value in values)


def _text(value: Any) -> str:
    if value is None:
        return "(nothing)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = ", ".join(map(_text, value[:6]))
        return f"[{shown}{', …' if len(value) > 6 else ''}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
