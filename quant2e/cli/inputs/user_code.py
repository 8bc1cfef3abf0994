"""Functions of the user's, ``module:function``: imported and called, as ``python -m`` would, from the current folder.

This is the one place of the command line that runs code, and it runs what the user names.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quant2e.errors import Quant2eError


def user_function(place: str) -> Callable[..., Any]:
    """The function at ``module:function``. Raises `Quant2eError` where there is none, or the import fails."""
    name, _, attribute = place.partition(":")
    with _current_folder_first():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and not f"{name}.".startswith(f"{error.name}."):
                raise Quant2eError(f"{place}: importing {name} needs {error.name}, which is not installed") from error
            raise Quant2eError(f"{place}: there is no module {name!r} here or on PYTHONPATH") from error
        except (Exception, SystemExit) as error:  # its exit code is not that of the verb
            raise Quant2eError(f"{place}: importing {name} failed with {_said(error)}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise Quant2eError(f"{place}: {name} has no function {attribute!r}")
    return _named(place, found)


def _named(place: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors say that they are of the user's code, and which leaves the current folder as it is:
    paths of the command line are relative to it.
    """

    def call(*args: Any) -> Any:
        try:
            with _current_folder_first():
                return function(*args)
        except Quant2eError:
            raise
        except (Exception, SystemExit) as error:  # its exit code is not that of the verb
            raise Quant2eError(f"{place} failed with {_said(error)} (--traceback shows where)") from error

    return call


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


@contextmanager
def _current_folder_first() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:  # the user's code may have its own ideas about it
            sys.path.remove(folder)
        os.chdir(folder)
