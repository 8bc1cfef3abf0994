"""Errors: one family, in which every message says what went wrong, where, and what to do.

``where`` renders the place: the node, its ATen target, the module that owns it and the user's source line,
as far as the graph still knows them.
"""

from __future__ import annotations

import re
from types import FunctionType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line needs errors before it needs torch
    from torch.fx import Node


class Quant2eError(RuntimeError):
    """Base of every error quant2e raises on purpose. A RuntimeError, which scripts written for PT2E catch."""


class CaptureError(Quant2eError, ValueError):
    """A model that cannot be captured, or a captured graph in the wrong state (training mode, say)."""


class AnnotationError(Quant2eError, ValueError):
    """A spec or an annotation that is wrong on its own: a bad range, an operand the op does not have."""


class PlanError(Quant2eError, ValueError):
    """Annotations that are well-formed one by one, and that no plan can satisfy together."""


class CalibrationError(Quant2eError):
    """A tensor whose range is unknown (no data) or unusable (NaN, infinite)."""


class AccuracyError(Quant2eError):
    """A quantized model whose output has lost the signal of the float one."""


class PassError(Quant2eError):
    """A rewrite that failed, or that left an illegal graph."""


class LoweringError(Quant2eError):
    """A target that cannot take the graph, or a lowered program that disagrees with it."""


class FileFormatError(Quant2eError, ValueError):
    """A file that is not what it should be: truncated, of another version, or not ours."""


class QuantizationWarning(UserWarning):
    """What a converted model does not do in integers, or loses; its report has the whole of it."""


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]*)')


def module_path(node: Node) -> str:
    """Dotted path of the innermost ``nn.Module`` the node came from; empty when it is not recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]).removeprefix("L['self'].") if paths else ""


def _user_frame(node: Node) -> re.Match[str] | None:
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    own = [f for f in frames if "/site-packages/torch/" not in f["file"] and not f["file"].startswith("<")] or frames
    return own[-1] if own else None


def user_frame(node: Node) -> str:
    """The innermost frame of a node's stack trace that is the user's code, as text; empty when there is none."""
    frame = _user_frame(node)
    return frame[0] if frame else ""


def source_line(node: Node) -> str:
    """The user's source line, as ``file:line `code` ``; empty when the graph does not record it.

    A graph from a file knows the name of the file and the line, and not the code.
    """
    frame = _user_frame(node)
    if frame is None:
        return ""
    code = frame["code"].strip()
    return f"{frame['file']}:{frame['line']}" + (f" `{code}`" if code else "")


def where(node: Node) -> str:
    """One line that finds the node: name, target, module, source line."""
    called = node.target.__name__ if isinstance(node.target, FunctionType) else node.target
    parts = [f"'{node.name}' ({called if node.op == 'call_function' else node.op})"]
    if path := module_path(node):
        parts.append(f"in module '{path}'")
    if line := source_line(node):
        parts.append(f"at {line}")
    return " ".join(parts)
