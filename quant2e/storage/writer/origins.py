"""Origins in a file: the module and the user's line that an op came from, without folders and source text.

/home/ann/net/model.py:12 `x = self.conv(x)`      =>      model.py:12
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from quant2e.errors import user_frame

_FRAME = re.compile(r'File "(?P<file>[^"]+)", (?P<rest>line \d+, in [^\n]*)')
_SOURCE = re.compile(r"(?P<file>.+?):(?P<line>\d+)(?: `.*`)?", re.DOTALL)
_FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[\\/]+[^\\/:\"'`\n]+)+[\\/]+(?=[^\\/:\"'`\n]+\.py\b)")
"""The folders in front of the name of a Python file, in an absolute path."""


def origin(node: Node) -> dict[str, str]:
    """What is kept of where ``node`` came from, under the names and in the form of torch."""
    made = {}
    if frame := _FRAME.match(user_frame(node)):
        made["stack_trace"] = f'File "{file_name(frame["file"])}", {frame["rest"]}\n'
    if stack := node.meta.get("nn_module_stack"):
        entries = ((str(path) or "L__self__", path, kind) for path, kind in stack.values())
        made["nn_module_stack"] = ";".join(f"{key},{path},{_type_name(kind)}" for key, path, kind in entries)
    if torch_fn := node.meta.get("torch_fn"):
        made["torch_fn"] = ";".join(torch_fn)
    if custom := node.meta.get("custom"):
        made["custom"] = json.dumps(custom)
    return made


def _type_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def file_name(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r"[\\/]", path)[-1]


def source_file(source: str) -> str:
    """The path in a source line as `quant2e.errors.source_line` writes it; empty when there is none."""
    match = _SOURCE.fullmatch(source)
    return match["file"] if match else ""


def without_folders(text: str, files: Iterable[str] = ()) -> str:
    """``text`` with the names of Python files where it has paths of them, and without the source text behind them.

    ``files``: paths that are known, whatever characters they have; other absolute paths are found by their form.
    """
    for file in sorted(files, key=len, reverse=True):
        if file in text:
            told = re.split(rf"{re.escape(file)}(:\d+)(?: `[^\n]*?`(?!\w))?", text)
            text = "".join(f"{file_name(file)}{part}" if index % 2 else part for index, part in enumerate(told))
            text = text.replace(file, file_name(file))
    return _FOLDERS.sub("", text)
