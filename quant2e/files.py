"""Atomic file writes: a reader sees the old file or the new one, whole.

A file is written under a temporary name beside its target and moved into place. While it is written, its writer holds a
lock on it that ends with the process, so that what killed writers left behind is recognised, and cleaned by the next.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

_locks: Any = None
try:
    import fcntl

    _locks = fcntl
except ImportError:  # Windows: nothing tells a dead writer from a live one, so nothing is cleaned there
    pass

_TEMPORARY = ".quant2e-"
"""How the names of temporary files begin: ``.quant2e-<machine>-<random><suffix>``."""

_ABANDONED = 24 * 3600.0
"""Seconds without a write after which a file of another machine, whose locks may not be seen here, has no writer."""

_LONGEST_SUFFIX = 16


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``, with its suffix; moved to ``path`` when the block ends without an error.

    The bytes are flushed to disk before the move, and the folder after it. Where ``path`` is a symbolic link, the file
    it points at is replaced and the link stays. Permissions are those that ``open(path, "w")`` would leave. On any
    error the temporary file is removed and ``path`` is as it was. Temporary files of killed writers in the same folder
    are removed first.

    Raises OSError when the folder does not exist or is not writable, and when ``path`` is there and is something else
    than a file that may be written.
    """
    target = _resolved(Path(path))
    replaced = _replaced(target)
    _clean(target.parent)
    part, handle = _temporary(target, 0o600 if replaced else 0o666)
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        if replaced is not None:
            _take_over(part, replaced)
        part.replace(target)
        _sync(target.parent)
    finally:
        part.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8 through `atomic_file`. Raises OSError."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def _resolved(path: Path) -> Path:
    """Where a file of this path is: behind symbolic links, whether or not it is there yet."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def _replaced(target: Path) -> os.stat_result | None:
    """The file that is about to be replaced; None where there is none."""
    try:
        there = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(there.st_mode):
        raise OSError(errno.EINVAL, "not a regular file, so it cannot be replaced by one", str(target))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    return there


def _temporary(target: Path, mode: int) -> tuple[Path, int | None]:
    """A new, empty file beside ``target``, and the handle that locks it.

    ``mode`` is cut by the process's umask, as that of any file is.
    """
    suffix = target.suffix if len(target.suffix) <= _LONGEST_SUFFIX else ""
    while True:
        part = target.with_name(f"{_TEMPORARY}{_machine()}-{uuid4().hex[:12]}{suffix}")
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), mode)
        if _locks is None:
            os.close(handle)
            return part, None
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is cleaned either
            _locks.flock(handle, _locks.LOCK_EX)
        if os.fstat(handle).st_nlink:  # another writer may have cleaned it before it was locked
            return part, handle
        os.close(handle)


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _clean(folder: Path) -> None:
    """Remove the temporary files of writers that are dead."""
    if _locks is None:
        return
    for entry in _entries(folder):
        with contextlib.suppress(OSError):
            handle = os.open(entry, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                _locks.flock(handle, _locks.LOCK_EX | _locks.LOCK_NB)
                idle = time.time() - os.fstat(handle).st_mtime
                if _machine() == entry.name.removeprefix(_TEMPORARY).partition("-")[0] or idle > _ABANDONED:
                    entry.unlink()
            finally:
                os.close(handle)


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return [
                Path(one.path)
                for one in found
                if one.name.startswith(_TEMPORARY) and one.is_file(follow_symlinks=False)
            ]
    except OSError:  # a folder that may be written and not be listed; one that is missing is told by what writes to it
        return []


def _take_over(part: Path, replaced: os.stat_result) -> None:
    """Owner, group and permissions of the file that is replaced, as far as this process may set them."""
    own = part.stat()
    if hasattr(os, "chown"):
        for ids in ((replaced.st_uid, -1), (-1, replaced.st_gid)):
            if ids not in ((own.st_uid, -1), (-1, own.st_gid)):
                with contextlib.suppress(PermissionError):
                    os.chown(part, *ids)
    part.chmod(stat.S_IMODE(replaced.st_mode) & 0o777)


def _sync(folder: Path) -> None:
    """Flush a folder, so that a move within it outlives a loss of power."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # may be written, and not be read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno == errno.EIO:  # others: the file system has no such call
            raise
    finally:
        os.close(handle)
