"""``python -m tests.mutants [WORD …] [--out FILE]``: plants each bug in a copy of the tree and runs its tests.

Only the mutants whose names hold one of the words, all without. A mutant is killed by the first test that fails; those
tests are run once more on the tree as it is, where all have to pass. The exit status is 0 when at most one survives.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import hypothesis  # noqa: F401  # what every test imports, once
import pytest
import torch._dynamo
import torch._inductor.config
import torch.export  # noqa: F401

from tests.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
PACKAGES = ("tests", "quant2e", "quantizers", "lowering", "benchmarks")
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "demo_output", "*.egg-info"
)
LIMIT = 900
"""Seconds for the tests of one mutant; a test that hangs has noticed something."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """``killer``: the test that failed, or why there is none."""

    mutant: Mutant
    killed: bool
    killer: str
    seconds: float

    def __str__(self) -> str:
        return f"{'killed' if self.killed else 'SURVIVED'}  {self.mutant.name} ({self.seconds:.0f} s): {self.killer}"


def run_tests(tree: Path, tests: tuple[str, ...], *options: str) -> tuple[int | None, str]:
    """Run tests of a tree in a copy of this process, which has torch; pytest's status, None where they do not end."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os._exit(_tests_in_child(tree, [*options, *tests]))
        until = time.monotonic() + LIMIT
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.2)
        output.seek(0)
        return (os.waitstatus_to_exitcode(ended[1]) if ended[0] else None), output.read()


def _tests_in_child(tree: Path, arguments: list[str]) -> int:
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    status = pytest.main(["-q", "-m", "not slow", "-p", "no:cacheprovider", *arguments])
    module = sys.modules.get("quant2e")
    assert module is None or str(module.__file__).startswith(str(tree)), "the tests ran another tree's packages"
    return int(status)


def plant(tree: Path, mutant: Mutant) -> str:
    """Patch a file; its text before."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} holds its text {text.count(mutant.old)} times; mend the table")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return text


def judge(tree: Path, mutant: Mutant) -> Verdict:
    """Plant one, run its tests, and take it out again."""
    began, before = time.monotonic(), plant(tree, mutant)
    try:
        status, said = run_tests(tree, mutant.tests, "-x")
    finally:
        (tree / mutant.file).write_text(before, encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
    killed = status is None or (status == 1 and bool(failed))
    killer = f"no end after {LIMIT} s" if status is None else failed[0] if killed else said.strip().splitlines()[-1]
    return Verdict(mutant, killed, killer, time.monotonic() - began)


def page(verdicts: list[Verdict], minutes: float) -> str:
    """The result as a page."""
    killed = sum(v.killed for v in verdicts)
    rows = [
        f"| {v.mutant.name} | `{v.mutant.file}` | {'`' + v.killer + '`' if v.killed else '**survived**'} |"
        for v in verdicts
    ]
    return "\n".join(
        [
            f"{killed} of {len(verdicts)} planted bugs were found, in {minutes:.0f} minutes.",
            "",
            "| planted bug | file | found by |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> int:
    """Judge the mutants that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants whose names hold one of these")
    parser.add_argument("--out", type=Path, help="where the result is written, as markdown")
    asked = parser.parse_args()
    chosen = [m for m in MUTANTS if not asked.words or any(word in m.name for word in asked.words)]
    began, verdicts = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="quant2e-mutants-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT, symlinks=True)
        for mutant in chosen:
            verdicts.append(judge(tree, mutant))
            print(verdicts[-1], flush=True)
        killers = tuple(dict.fromkeys(v.killer for v in verdicts if v.killed and "::" in v.killer))
        clean = run_tests(tree, killers) if killers else (0, "")
    text = page(verdicts, (time.monotonic() - began) / 60)
    print(f"\n{text.splitlines()[0]}")
    if asked.out is not None:
        asked.out.write_text(text, encoding="utf-8")
    if clean[0] != 0:
        print(f"tests that fail without any bug as well:\n{clean[1][-2000:]}")
        return 2
    return int(sum(not v.killed for v in verdicts) > 1)


if __name__ == "__main__":
    sys.exit(main())
