"""Arguments of the command line as click reads them: what is wrong with one is said before torch is imported."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

_CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

ARRAYS = (".npz", ".safetensors")
"""Suffixes of files that hold one array for each input."""


def is_code(text: str) -> bool:
    """Whether an argument is ``module:function``, and not a path."""
    return _CODE.fullmatch(text) is not None and not Path(text).exists()


class _Type(click.ParamType):  # type: ignore[type-arg]  # it is generic from click 8.5 on, and cannot be before
    """A kind of argument."""


class Existing(_Type):
    """The path of a file that is there, with one of some suffixes."""

    name = "file"

    def __init__(self, *suffixes: str, code: bool = False) -> None:
        self._suffixes, self._code = suffixes, code

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value)
        if self._code and is_code(text):
            return text
        path, wanted = Path(text), " or ".join(self._suffixes)
        other = ", or module:function" if self._code else ""
        if not path.exists():
            self.fail(f"there is no file {text}; this is a file that ends in {wanted}{other}")
        if path.suffix in {".pt", ".pth", ".bin", ".ckpt"} and ".pt2" in self._suffixes:
            self.fail(
                f"{text} is a pickle, and reading one runs what is in it: export the model with torch.export.save to a "
                f".pt2 file{other}"
            )
        if path.is_dir() or path.suffix not in self._suffixes:
            self.fail(f"{text} does not end in {wanted}{other}")
        if not path.is_file():
            self.fail(f"{text} is no file, but a device or a pipe")
        return text if self._code else path


class DataSource(_Type):
    """Calibration data: a file of arrays, or a folder."""

    name = "data"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(str(value))
        if not path.exists():
            self.fail(f"there is no file or folder {path}")
        if not path.is_dir() and not path.is_file():
            self.fail(f"{path} is no file and no folder, but a device or a pipe")
        if path.is_file() and path.suffix not in ARRAYS:
            self.fail(f"{path}: data is a {' or '.join(ARRAYS)} file, or a folder of images, .npy or .npz files")
        return path


class OutputFile(_Type):
    """The path of a file to write, with a suffix, in a folder that is there."""

    name = "file"

    def __init__(self, *suffixes: str) -> None:
        self._suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(str(value))
        if path.suffix not in self._suffixes:
            self.fail(f"{path} does not end in {' or '.join(self._suffixes)}")
        if not path.parent.is_dir():
            self.fail(f"there is no folder {path.parent} to write {path.name} to")
        if path.exists() and not path.is_file():
            self.fail(f"{path} is there and is no file, so that none can be written in its place")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            self.fail(f"{path} cannot be written: permission denied")
        return path


class PageFile(OutputFile):
    """The path of a page to write, last of all: that it cannot be made is told first."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
            self.fail(f"pages are made with {' and '.join(missing)}, not installed here: pip install quant2e[html]")
        return super().convert(value, param, ctx)


class FunctionName(_Type):
    """``module:function``, the user's own code."""

    name = "module:function"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if _CODE.fullmatch(text) is None:
            self.fail(f"{text!r} is not module:function, as in my_metrics:top1")
        return text


class Share(_Type):
    """A share: ``0.5%``, or 0.005. ``units``: also a number above 1, of something else than a share."""

    name = "share"

    def __init__(self, *, units: bool = False) -> None:
        self._most = math.inf if units else 1.0

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
        except ValueError:
            number = math.nan
        if not 0.0 <= number <= self._most or number == math.inf:
            self.fail(f"{text!r} is no share: 0.5%, or 0.005")
        return number


class NumberList(_Type):
    """Numbers with commas between them. ``whole``: positive whole ones."""

    name = "numbers"

    def __init__(self, *, whole: bool = False, positive: bool = False) -> None:
        self._whole, self._positive = whole, positive or whole

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self._number(part.strip()) for part in str(value).split(","))

    def _number(self, text: str) -> float:
        if self._whole:
            if not text.isdecimal() or int(text) < 1:
                self.fail(f"{text!r} is not a positive whole number")
            return int(text)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or (self._positive and number <= 0):
            self.fail(f"{text!r} is not a {'positive ' if self._positive else ''}number")
        return number


class ImageSize(_Type):
    """Height and width of images: ``224``, or ``240x320``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", str(value))
        if found is None:
            self.fail(f"{value!r} is no size of images: 224, or height x width as in 240x320")
        return int(found[1]), int(found[2] or found[1])


def refuse_overwriting(params: Iterable[click.Parameter], values: Mapping[str, Any]) -> None:
    """Raise a usage error where a file that is to be written is one that is read, or that is written twice.

    ``params``: of a command; ``values``: of its arguments, by name. Paths are compared as files, however spelled.
    """
    read: list[tuple[str, Path]] = []
    written: list[tuple[str, Path]] = []
    for param in params:
        value = values.get(param.name or "")
        paths = [Path(one) for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, str | Path)]
        label = max(param.opts, key=len) if param.param_type_name == "option" else (param.metavar or str(param.name))
        if isinstance(param.type, OutputFile):
            written += [(label, path) for path in paths]
        elif isinstance(param.type, Existing | DataSource):
            read += [(label, path) for path in paths]
    for index, (label, path) in enumerate(written):
        for other, taken in (*read, *written[:index]):
            if _same_file(path, taken):
                raise click.UsageError(f"{label} and {other} are both {taken}: give what is written another name")


class OutputFiles:
    """The files that a command is to write, as they are before it runs. Arguments: as of `refuse_overwriting`."""

    def __init__(self, params: Iterable[click.Parameter], values: Mapping[str, Any]) -> None:
        named = {param.name for param in params if isinstance(param.type, OutputFile)}
        paths = [value for name, value in values.items() if name in named and isinstance(value, Path)]
        self._before = {path: _stamp(path) for path in paths}

    def written(self) -> str:
        """The end of a sentence that says why the command did not end well: which files are new all the same."""
        new = [str(path) for path, before in self._before.items() if _stamp(path) not in (before, None)]
        return f"; written before that, whole: {', '.join(new)}" if new else ""


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _same_file(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)
