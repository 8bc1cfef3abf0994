"""Looks at a ``.pt2`` file before torch does: is it one, and can loading it run code?

An archive of torch.export is a zip of JSON and raw tensors, but it may also hold pickles, compiled libraries, names
that resolve to any attribute of torch, and expressions that sympy evaluates. None of these is needed for a quantized
program, so each is refused here, before torch reads a byte.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quant2e.errors import FileFormatError

_TARGET = re.compile(
    r"torch\.ops\.(aten|quantized_decomposed|prims|_c10d_functional)\.\w+\.\w+"
    r"|torch\.ops\.higher_order\.(cond|while_loop|map_impl|scan|associative_scan|wrap_with_autocast|wrap_with_set_grad_enabled)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.(ceil|floor|sqrt|trunc|log2|exp)|torch\.sym_(float|int|max|min|not|ite|sum|sqrt)"
    r"|torch\._sym_sqrt"
)
"""Names of the ops a program may call."""

_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_CLASS = re.compile(r"[A-Z][A-Za-z]*")


def check_archive(path: Path) -> None:
    """Raise `FileFormatError` when ``path`` is no archive of torch.export, is damaged, or could run code when loaded."""
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist, or is not a file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise FileFormatError(f"{path} is damaged: the part '{damaged}' does not match its checksum")
            _check_parts(path, archive)
    except zipfile.BadZipFile as error:
        raise FileFormatError(f"{path} is not a .pt2 file, or was cut off: {error}") from error


def _check_parts(path: Path, archive: zipfile.ZipFile) -> None:
    models = 0
    for name in archive.namelist():
        inner = name.split("/", 1)[-1]
        if inner.startswith("models/") and inner.endswith(".json"):
            models += 1
            _check_program(path, _json(path, archive, name))
        elif inner.startswith("data/aotinductor"):
            raise FileFormatError(f"{path} holds compiled code ('{inner}'); a quantized program holds none")
        elif inner.endswith("_config.json"):
            _check_payloads(path, _json(path, archive, name))
    if models == 0:
        raise FileFormatError(f"{path} holds no exported program")


def _json(path: Path, archive: zipfile.ZipFile, name: str) -> Any:
    try:
        return json.loads(archive.read(name))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: its part '{name}' is not JSON: {error}") from error


def _check_payloads(path: Path, config: Any) -> None:
    for key, value in _walk(config):
        if key == "use_pickle" and value is not False:
            raise FileFormatError(
                f"{path} holds pickled objects, which can run code when loaded; save the tensors plainly"
            )


def _check_program(path: Path, program: Any) -> None:
    for key, value in _walk(program):
        if key == "target" and isinstance(value, str) and not _TARGET.fullmatch(value) and _looks_callable(value):
            raise FileFormatError(f"{path} calls '{value}', which is not an op that a quantized program uses")
        if key == "expr_str" and not _harmless_expression(value):
            raise FileFormatError(f"{path} holds an expression that is not a plain shape formula: {value!r}")


def _looks_callable(target: str) -> bool:
    """Targets of nodes resolve below torch, operator or math; those of signatures are plain names of tensors."""
    return target.startswith(("torch", "_operator", "math", "#"))


def _harmless_expression(text: Any) -> bool:
    """Whether a shape expression consists of numbers, symbols and calls of classes only."""
    if not isinstance(text, str):
        return text is None
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    return all(_harmless_part(part) for part in ast.walk(tree))


def _harmless_part(part: ast.AST) -> bool:
    if isinstance(part, ast.Call):
        return isinstance(part.func, ast.Name) and _CLASS.fullmatch(part.func.id) is not None
    if isinstance(part, ast.Name):
        return _SYMBOL.fullmatch(part.id) is not None and "__" not in part.id
    if isinstance(part, ast.Constant):
        if isinstance(part.value, str):
            return _SYMBOL.fullmatch(part.value) is not None and "__" not in part.value
        return isinstance(part.value, (bool, int, float))
    return isinstance(part, (ast.Expression, ast.Load, ast.keyword, ast.UnaryOp, ast.USub, ast.UAdd))


def _walk(data: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    pending = [data]
    while pending:
        current = pending.pop()
        if isinstance(current, dict):
            yield from current.items()
            pending.extend(current.values())
        elif isinstance(current, list):
            pending.extend(current)
