"""Module paths and types of a node, as the graph records them and users spell them."""

from __future__ import annotations

import re
from functools import lru_cache

from torch.fx import Node

_GETATTR = re.compile(r"getattr\((?P<owner>[^()]*), '(?P<name>[^']*)'\)")
_INDEX = re.compile(r"(?:\._modules)?\[['\"]?(?P<name>[^\]'\"]+)['\"]?\]")


def module_stack(node: Node) -> list[tuple[str, str]]:
    """``(path, qualified type)`` of the modules around a node, outermost first; the root's path is empty."""
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        qualified = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        found.append((plain_path(str(path)), qualified))
    return found


def enclosing_paths(node: Node) -> list[str]:
    """Paths of the modules around a node, innermost first, with containers (``ModuleList``), which are never called."""
    paths: dict[str, None] = {}
    for path, _ in reversed(module_stack(node)):
        while path:
            paths[path] = None
            path = path.rpartition(".")[0]
    return [*sorted(paths, key=lambda p: p.count("."), reverse=True), ""]


@lru_cache(maxsize=4096)
def plain_path(path: str) -> str:
    """``blocks.0.linear`` for ``L['self'].blocks[0].linear`` and the other spellings of tracers and scripts."""
    while (plain := _GETATTR.sub(r"\g<owner>.\g<name>", path)) != path:
        path = plain
    path = path.removeprefix("L['self']")
    path = _INDEX.sub(r".\g<name>", path)
    # The second call of a module is traced as "linear@1".
    return ".".join(part.partition("@")[0] for part in path.split(".") if part)
