"""YAML text, read strictly: plain data only, no key twice, no NaN, no alias; PyYAML is asked for where it is missing.

It is read for what JSON has: mappings with text as keys, lists, text, numbers, true, false and null. Nothing in it is
run, and no text is larger in memory than it looks: anchors, aliases and tags of other types are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quant2e.errors import FileFormatError

Path = tuple[str | int, ...]
"""Where in a document something is: keys and indices."""

LARGEST = 1 << 20
"""Characters of a text: a thousand times as many as a long one has."""

_LEVELS = 100
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_INTEGER = re.compile(r"[-+]?\d{1,20}")


def read_yaml(text: str, what: str) -> Any:
    """The data that ``text`` describes: numbers, strings, booleans, None, lists and dicts with strings as keys.

    ``what`` names it in errors. Raises `FileFormatError`, and ImportError without PyYAML.
    """
    return read_yaml_lines(text, what)[0]


def read_yaml_lines(text: str, what: str) -> tuple[Any, dict[Path, int]]:
    """As `read_yaml`, and the line, from 1, on which each part of the data begins."""
    yaml = _yaml()
    if len(text) > LARGEST:
        raise FileFormatError(f"{what} has {len(text):,} characters; {LARGEST:,} are read at most")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if getattr(event, "anchor", None) or depth > _LEVELS:
                said = (
                    "it is nested too deeply" if depth > _LEVELS else "anchors and aliases are not read: write it out"
                )
                raise FileFormatError(f"{what}:{event.start_mark.line + 1}: {said}")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise FileFormatError(f"{what} is not YAML: {' '.join(str(error).split())}") from error
    lines: dict[Path, int] = {}
    return None if node is None else _data(node, (), lines, what), lines


def yaml_text(data: Mapping[str, Any]) -> str:
    """Plain data as YAML, keys in their order. Raises ImportError without PyYAML."""
    return str(_yaml().safe_dump(data, sort_keys=False, allow_unicode=True, width=120))


def _data(node: Any, path: Path, lines: dict[Path, int], what: str) -> Any:
    lines[path] = node.start_mark.line + 1
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if node.id == "sequence" and tag == "seq":
        return [_data(item, (*path, index), lines, what) for index, item in enumerate(node.value)]
    if node.id == "mapping" and tag == "map":
        found: dict[str, Any] = {}
        for key, value in node.value:
            place = f"{what}:{key.start_mark.line + 1}"
            if key.id != "scalar" or key.tag != "tag:yaml.org,2002:str":
                raise FileFormatError(f"{place}: the key {str(key.value)[:80]!r} is no text; put it into quotes")
            if key.value in found:
                raise FileFormatError(f"{place}: the key {key.value[:80]!r} stands twice in one mapping")
            found[key.value] = _data(value, (*path, key.value), lines, what)
            lines[(*path, key.value)] = key.start_mark.line + 1
        return found
    if node.id == "scalar":
        return _scalar(node, tag, f"{what}:{lines[path]}")
    raise FileFormatError(f"{what} is not YAML of plain data: the tag {tag[:80]} in line {lines[path]}")


def _scalar(node: Any, tag: str, place: str) -> Any:
    text, plain = node.value, node.style is None
    if tag == "bool":
        return text.lower() in ("true", "yes", "on")
    if tag == "null":
        return None
    if plain and _INTEGER.fullmatch(text):
        return int(text)
    if plain and _NUMBER.fullmatch(text) and abs(float(text)) < float("inf"):  # 1e-3 is a number here, as in JSON
        return float(text)
    if tag == "str":
        return text
    if tag in ("float", "int"):
        raise FileFormatError(f"{place}: {text[:80]} is no number here")
    kind = {"timestamp": "date"}.get(tag, tag[:80])
    raise FileFormatError(f"{place}: {text[:80]} is a {kind}; numbers, texts, lists and mappings are read")


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("YAML needs PyYAML: pip install 'quant2e[yaml]', or use JSON or dicts") from error
    return yaml
