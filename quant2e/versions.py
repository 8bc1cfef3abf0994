"""Versions of Python, torch and ExecuTorch: which were tested, what differs between them, what to expect of others.

The one file that may ask which version of a library is installed (``tests/test_versions.py`` reads the others). What a
release of torch has moved or renamed is looked up here under one name, and the rest of the source uses that name.
"""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch

Release = tuple[int, int]
"""Major and minor number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """The releases of one library that the tests are run on, from ``oldest`` to ``newest``, both included.

    ``expect``: what to expect of a newer one, as the end of a sentence.
    """

    name: str
    oldest: Release
    newest: Release
    expect: str

    @property
    def requirement(self) -> str:
        """The range as pip writes it."""
        major, minor = self.newest
        return f"{self.name}>={_text(self.oldest)},<{major}.{minor + 1}"

    def advice(self, version: str) -> str:
        """What to know about a version outside of the range; empty for one within."""
        release = release_of(version)
        if self.oldest <= release <= self.newest:
            return ""
        known = f"quant2e is tested with {self.name} {_text(self.oldest)} to {_text(self.newest)}"
        if release < self.oldest:
            return f"{known}, and {version} is older: names that it lacks end in errors. Install '{self.requirement}'"
        return f"{known}, and {version} is newer: {self.expect}. '{self.requirement}' is what was tested"


TORCH = Tested(
    name="torch",
    oldest=(2, 13),
    newest=(2, 14),
    expect=(
        "capture, calibration and files most likely work; Inductor's passes move between releases, so that fewer ops "
        "may become int8 kernels (the program's report says which), and what is lowered is compared with its Q/DQ "
        "graph, so that wrong numbers are an error; an op of a new name stays float, with a reason in the report"
    ),
)
EXECUTORCH = Tested(
    name="executorch",
    oldest=(1, 4),
    newest=(1, 5),
    expect=(
        "fewer ops may be delegated (the program's report says which), and a program is compared with its Q/DQ graph "
        "before it is returned, so that wrong numbers are an error"
    ),
)
PYTHON = Tested(
    name="python",
    oldest=(3, 11),
    newest=(3, 13),
    expect="where torch has a wheel for it, everything most likely works",
)

TORCH_VERSION = str(torch.__version__)
"""Of the torch of this process, as files record it."""

SCHEMA = (8, 20)
"""Version of torch's schema of exported programs that is written and read, that of torch 2.13 and 2.14. A later minor
version may hold keys that mean something else."""


def release_of(version: str) -> Release:
    """Major and minor number of a version such as ``2.14.1+cu130``; (0, 0) for what has none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@cache
def warn_of_untested_torch() -> None:
    """Warn, once in a process, where torch or Python is none that was tested."""
    python = ".".join(map(str, sys.version_info[:3]))
    for library, version in ((PYTHON, python), (TORCH, TORCH_VERSION)):
        _warn(library.advice(version))


@cache
def warn_of_untested_executorch() -> None:
    """Warn, once in a process, where the ExecuTorch that is installed is none that was tested."""
    try:
        version = metadata.version("executorch")
    except metadata.PackageNotFoundError:  # built from source, without metadata
        return
    _warn(EXECUTORCH.advice(version))


def _warn(advice: str) -> None:
    if advice:
        warnings.warn(advice, stacklevel=3)


def _text(release: Release) -> str:
    return f"{release[0]}.{release[1]}"
