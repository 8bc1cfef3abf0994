"""Package files of AOTInductor: what is in them, without the paths of this machine and with a checksum; loading.

A package is a zip of the shared library, the C++ it was compiled from and a few words of JSON, one of which is our
record (`quant2e.storage.inductor_package`). The checksum is the comment of the zip, so it covers every byte of the
file, the zip's own directory too.
"""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from quant2e.checksum import BLANK, check_file, sealed
from quant2e.errors import FileFormatError, LoweringError
from quant2e.isolation import tracing
from quant2e.storage.inductor_package import PackageRecord, with_record

_END_OF_ZIP = b"PK\5\6"
_TEXTS = frozenset({".cpp", ".json", ".h"})


def archive(files: Sequence[Any]) -> bytes:
    """A zip of the files that AOTInductor generated, which `finished` makes a package of ours."""
    from torch._inductor.package import package_aoti

    content = io.BytesIO()  # written to a buffer, a package holds no trace of the name of a file
    with tempfile.TemporaryDirectory(prefix="quant2e_") as folder:
        package_aoti(content, [_without_paths(file, Path(folder)) for file in files])
    return content.getvalue()


def finished(content: bytes, record: PackageRecord) -> bytes:
    """The bytes of a package: the zip with what it says of itself, and a checksum over all of it."""
    return sealed(_with_comment(with_record(content, record), BLANK.encode()))


def load_package(path: Path) -> Callable[..., Any]:
    """A package that was written here, as ``torch._inductor.aoti_load_package`` gives it.

    Raises `FileFormatError` when the file has changed since it was written, or is another, and `LoweringError` when it
    cannot be loaded.
    """
    from torch._inductor import aoti_load_package

    if not check_file(path):
        raise FileFormatError(f"{path} is not the package that was written here: it carries no checksum")
    try:
        with tracing():
            loaded: Callable[..., Any] = aoti_load_package(path)
    except Exception as error:
        raise LoweringError(f"{path} cannot be loaded: {error}") from error
    return loaded


def _with_comment(content: bytes, comment: bytes) -> bytes:
    """A zip with a comment, which is what its last record ends in."""
    assert content[-22:-18] == _END_OF_ZIP, "an archive without a comment"
    assert content[-2:] == b"\0\0", "an archive without a comment"
    return content[:-2] + struct.pack("<H", len(comment)) + comment


def _without_paths(file: Any, folder: Path) -> Any:
    """A generated file, or a copy of it in ``folder`` where it names folders of this machine."""
    if not isinstance(file, str) or not Path(file).is_file():
        return file
    path = Path(file)
    before = path.read_bytes()
    after = hidden(before, text=path.suffix in _TEXTS)
    if after == before:
        return file
    copy = folder / path.name
    copy.write_bytes(after)
    return str(copy)


def hidden(content: bytes, *, text: bool) -> bytes:
    """Generated code or text in which no folder of this machine is named.

    In a library the strings of asserts name the files they are in: what stands for a folder there has its length, and
    means the current one.
    """
    folders = [re.escape(os.fsencode(folder)) for folder in _folders()]
    if text:
        return re.sub(rb"(?:%b)(?=/)" % b"|".join(folders), b".", content)
    source = rb"(?:%b)(?=(?:/[\w.+-]+)+\.(?:h|hpp|cpp|cc|c|o|so)\0)" % b"|".join(folders)
    return re.sub(source, lambda found: b"." + b"/" * (len(found[0]) - 1), content)


def _folders() -> list[str]:
    """Folders of this machine that generated code names, the longest first."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    torch_in = Path(torch.__file__).parents[1]
    found = {cache_dir(), str(torch_in), sys.prefix, sys.base_prefix, str(Path.home()), str(Path.cwd())}
    found |= {os.path.realpath(folder) for folder in found}
    return sorted((folder for folder in found if len(folder) > 1), key=len, reverse=True)
