"""YAML text, read strictly: plain data only, no key twice, no NaN; PyYAML is asked for where it is not installed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from quant2e.errors import FileFormatError


def read_yaml(text: str, what: str) -> Any:
    """The data that ``text`` describes: numbers, strings, booleans, None, lists and dicts with strings as keys.

    ``what`` names it in errors. Raises `FileFormatError`, and ImportError without PyYAML.
    """
    yaml = _yaml()
    try:
        for node in _nodes(yaml.compose(text, Loader=yaml.SafeLoader)):
            if isinstance(node, yaml.MappingNode):
                keys = [str(key.value) for key, _ in node.value]
                twice = next((key for key in keys if keys.count(key) > 1), None)
                if twice is not None:
                    raise FileFormatError(f"{what}: the key {twice[:80]!r} stands twice in one mapping")
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FileFormatError(f"{what} is not YAML: {error}") from error
    _check_plain(data, what)
    return data


def yaml_text(data: Mapping[str, Any]) -> str:
    """Plain data as YAML, keys in their order. Raises ImportError without PyYAML."""
    return str(_yaml().safe_dump(data, sort_keys=False, allow_unicode=True, width=120))


def _nodes(root: Any) -> Iterator[Any]:
    """Every node of a composed text, each once: aliases stand for the same node."""
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node.value, list):
            pending += [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]


def _check_plain(data: Any, what: str) -> None:
    if isinstance(data, dict):
        for key, value in data.items():
            if not isinstance(key, str):
                raise FileFormatError(f"{what}: the key {key!r} is no text; put it into quotes")
            _check_plain(value, what)
    elif isinstance(data, list):
        for value in data:
            _check_plain(value, what)
    elif isinstance(data, float) and not math.isfinite(data):
        raise FileFormatError(f"{what}: {data} is no number here")
    elif not isinstance(data, str | int | float | None):
        raise FileFormatError(
            f"{what}: {data!r} is a {type(data).__name__}; numbers, texts, lists and mappings are read"
        )


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("YAML needs PyYAML: pip install 'quant2e[yaml]', or use JSON or dicts") from error
    return yaml
