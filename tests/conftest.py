"""Fixtures for all tests: golden texts, a fixed seed, and a reason where there is no C++ compiler."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from quant2e.passes.runner import checking
from tests.pass_checks import watch

GOLDEN = Path(__file__).parent / "golden"
LONG = Path(__file__).parent / "long_tests.txt"
"""Tests that are marked slow because of what they were measured to take, cases of tables among them."""


@dataclass(frozen=True)
class Golden:
    """Compares a text with the one stored under ``folder``; with ``update``, stores it instead."""

    folder: Path
    update: bool

    def __call__(self, name: str, text: str) -> None:
        """Fail with a diff unless ``text`` equals the golden text ``name`` (a path without its ``.txt``)."""
        __tracebackhide__ = True
        path = self.folder / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"there is no golden text {path}: run with --update-golden, then read what was written")
        stored = path.read_text(encoding="utf-8")
        if text != stored:
            lines = (t.splitlines(keepends=True) for t in (stored, text))
            diff = "".join(difflib.unified_diff(*lines, fromfile=str(path), tofile="this run"))
            pytest.fail(f"{diff}\nIf the new text is right, run with --update-golden and commit the difference.")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="store what the tests produce under tests/golden/")


def long_tests() -> list[str]:
    """The tests of `LONG`, as pytest names them."""
    lines = LONG.read_text(encoding="utf-8").splitlines()
    return [line.split(maxsplit=1)[1] for line in lines if line and not line.startswith("#")]


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    measured = frozenset(long_tests())
    for item in items:
        if item.nodeid in measured:
            item.add_marker("slow")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        return
    skip = pytest.mark.skip(reason="torch.compile needs a C++ compiler, and neither $CXX, g++ nor clang++ is here")
    for item in items:
        if item.get_closest_marker("inductor"):
            item.add_marker(skip)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """``golden("plans/conv", text)`` compares with ``tests/golden/plans/conv.txt``."""
    return Golden(GOLDEN, request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, in whatever order and on whatever worker it runs."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def watched_passes() -> Iterator[None]:
    """Every pass that a test runs leaves a legal graph, with the result that it had."""
    with checking(watch):
        yield
