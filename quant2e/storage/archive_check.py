"""Archive checks of a ``.pt2`` file, before torch reads it: is it one, and can loading it run code?

An archive of torch.export is a zip of JSON and raw tensors, but torch also accepts pickles in it (of weights, constants
and example inputs, each under several names), compiled libraries, names that resolve to any attribute of torch or to
any module, and expressions that sympy evaluates. None of these is needed for a quantized program, so each is refused
here. The parts are read with torch's own reader, so that both see the same bytes.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket, _OpNamespace

from quant2e.errors import FileFormatError

_MODEL, _WEIGHTS, _INPUTS = (
    r"models/[^/]+\.json",
    r"data/(weights|constants)/[^/]+_config\.json",
    r"data/sample_inputs/[^/]+",
)
_PAYLOAD = r"(weight|tensor)_\d+"
_PARTS = re.compile(
    rf"{_MODEL}|{_WEIGHTS}|{_INPUTS}|data/(weights|constants)/{_PAYLOAD}|extra/.+"
    r"|archive_format|archive_version|byteorder|\.(data/)?(version|serialization_id|format_version|storage_alignment)"
)
"""Parts that a plain program consists of."""

_PLAIN_FUNCTION = re.compile(
    r"torch\.ops\.higher_order\.(cond|while_loop|map_impl|scan|associative_scan|wrap_with_autocast|wrap_with_set_grad_enabled)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.(ceil|floor|sqrt|trunc|log2|exp)|torch\.sym_(float|int|max|min|not|ite|sum|sqrt)|torch\._sym_sqrt"
)
"""Functions that a program may call besides registered ops."""

_OP = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)")
_FORBIDDEN_OPS = frozenset({torch.ops.aten.from_file.default, torch.ops.aten.from_file.out})

_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_CLASS = re.compile(r"[A-Z][A-Za-z]*")
_FACTORIES = ("list", "dict", "set", "tuple", "int", "float", "bool", "str")


def check_archive(path: Path) -> None:
    """Raise `FileFormatError` when ``path`` is no archive of torch.export, is damaged, or could run code when
    loaded.
    """
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist, or is not a file")
    try:
        names = _names(path)
        reader = torch._C.PyTorchFileReader(str(path))
        parts = reader.get_all_records()
    except FileFormatError:
        raise
    except Exception as error:
        raise FileFormatError(f"{path} is not a .pt2 file, or was cut off: {error}") from error
    root = names[0].partition("/")[0]
    if sorted(names) != sorted(f"{root}/{part}" for part in parts) or len(set(names)) != len(names):
        raise FileFormatError(f"{path} is not a .pt2 file: its list of parts is ambiguous")
    _check_parts(path, reader, parts)


def _names(path: Path) -> list[str]:
    """Names of the parts of a zip, all of which match their checksums."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise FileFormatError(f"{path} is damaged: the part '{damaged}' does not match its checksum")
        names = archive.namelist()
    if not names:
        raise FileFormatError(f"{path} is an empty archive")
    return names


def _check_parts(path: Path, reader: Any, parts: list[str]) -> None:
    for part in parts:
        if not _PARTS.fullmatch(part):
            raise FileFormatError(
                f"{path} holds '{part}', which is no part of a plain program: pickled objects and "
                "compiled code can run "
                "anything when they are loaded"
            )
        if re.fullmatch(_MODEL, part):
            _check_program(path, _json(path, part, reader.get_record(part)))
        elif re.fullmatch(_WEIGHTS, part):
            _check_payloads(path, _json(path, part, reader.get_record(part)))
        elif re.fullmatch(_INPUTS, part):
            _check_inputs(path, reader.get_record(part))
    if not any(re.fullmatch(_MODEL, part) for part in parts):
        raise FileFormatError(f"{path} holds no exported program")


def _json(path: Path, part: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: its part '{part}' is not JSON: {error}") from error


def _check_payloads(path: Path, config: Any) -> None:
    for key, value in _walk(config):
        if key == "use_pickle" and value is not False:
            raise FileFormatError(
                f"{path} holds pickled objects, which can run code when loaded; save the tensors plainly"
            )
        # What the loader does with a payload follows from its name: some names mean pickles whatever the flag says.
        if key == "path_name" and not (isinstance(value, str) and re.fullmatch(_PAYLOAD, value)):
            raise FileFormatError(f"{path} holds the payload {value!r}, which is not a plain tensor")


def _check_inputs(path: Path, data: bytes) -> None:
    """Example inputs are pickled; torch falls back to running the pickle when it holds more than plain data."""
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise FileFormatError(
            f"{path} holds example inputs that are not plain tensors, numbers and containers: {error}"
        ) from error


def _check_program(path: Path, program: Any) -> None:
    for key, value in _walk(program):
        if key in ("target", "as_operator") and not _callable_is_plain(value):
            raise FileFormatError(f"{path} calls {value!r}, which is not an op that a quantized program uses")
        if key == "expr_str" and not _harmless_expression(value):
            raise FileFormatError(f"{path} holds an expression that is not a plain shape formula: {value!r}")
        if key in ("in_spec", "out_spec") and isinstance(value, str):
            _check_structure(path, value)


def _callable_is_plain(target: Any) -> bool:
    if not isinstance(target, str):
        return target is None
    op = _OP.fullmatch(target)
    if op is None or op[1] == "higher_order":
        return _PLAIN_FUNCTION.fullmatch(target) is not None
    found: Any = torch.ops
    for name, kind in zip(op.groups(), (_OpNamespace, OpOverloadPacket, OpOverload), strict=True):
        found = getattr(found, name, None)
        if not isinstance(found, kind):
            return False
    return found not in _FORBIDDEN_OPS


def _check_structure(path: Path, text: str) -> None:
    """The description of nested containers: JSON, with JSON in strings, that may name modules to import."""
    pending = [text]
    while pending:
        for key, value in _walk([_json(path, "the structure of inputs and outputs", pending.pop())]):
            if key in ("__enum__", "fqn") or (key == "default_factory_module" and value != "builtins"):
                raise FileFormatError(f"{path} names code to import in the structure of its inputs: {key} {value!r}")
            if key == "default_factory_name" and value not in _FACTORIES:
                raise FileFormatError(f"{path} names code to call in the structure of its inputs: {value!r}")
            if key == "context" and isinstance(value, str):
                pending.append(value)


def _harmless_expression(text: Any) -> bool:
    """Whether a shape expression consists of numbers, symbols and calls of classes only."""
    if not isinstance(text, str):
        return text is None
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
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
    """Every key with its value, at any depth; members of lists have an empty key."""
    pending = [data]
    while pending:
        current = pending.pop()
        if isinstance(current, dict):
            yield from current.items()
            pending.extend(current.values())
        elif isinstance(current, list):
            yield from (("", value) for value in current)
            pending.extend(current)
