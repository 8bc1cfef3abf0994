"""The peers' suites: which files of a checkout hold tests of the flow, and how they are copied and run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from tests.peers.imports import rewritten

ROOT = Path(__file__).parents[2]

LIMIT = 3600
"""Seconds for one file, where a machine is busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """``copied``: folders and files of the checkout that tests import; ``tests``: globs; ``words``: pytest's -k."""

    peer: str
    folder: str
    copied: tuple[str, ...]
    tests: tuple[str, ...]
    words: str = ""


TORCHAO = Suite(
    peer="torchao",
    folder="peers_torchao",
    copied=("torchao/testing/pt2e/utils.py",),
    tests=tuple(
        f"test/quantization/pt2e/test_{name}.py"
        for name in (
            "quantize_pt2e",
            "quantize_pt2e_qat",
            "x86inductor_quantizer",
            "representation",
            "metadata_porting",
            "duplicate_dq",
            "graph_utils",
            "numeric_debugger",
        )
    ),
)
_XNNPACK = "backends/xnnpack/test"
EXECUTORCH = (
    Suite(
        peer="ExecuTorch",
        folder="peers_executorch",
        copied=(_XNNPACK, "backends/test/harness"),
        tests=(f"{_XNNPACK}/quantizer/test_xnnpack_quantizer.py", f"{_XNNPACK}/quantizer/test_pt2e_quantization.py"),
    ),
    Suite(
        peer="ExecuTorch",
        folder="peers_executorch",
        copied=(_XNNPACK, "backends/test/harness"),
        tests=(f"{_XNNPACK}/ops/test_*.py",),
        words="qs8 or qd8 or qc8 or qc4 or qu8 or quant",
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """``test``: file, class and name, as pytest writes it; ``message``: of a failure, "" where it passed."""

    test: str
    kind: str
    message: str = ""

    @property
    def file(self) -> str:
        return self.test.partition("::")[0]


def check_checkout(suite: Suite, checkout: Path) -> None:
    """Raise where the checkout lacks what is copied."""
    missing = [path for path in suite.copied if not (checkout / path).exists()]
    missing += [pattern for pattern in suite.tests if not list(checkout.glob(pattern))]
    if missing:
        raise SystemExit(
            f"{checkout}: no checkout of {suite.peer}, or a version that this was not written for: it has no "
            f"{missing[0]}. Name the folder that holds the whole repository."
        )


def copy_suite(suite: Suite, checkout: Path, target: Path) -> list[Path]:
    """Write the suite into ``target``, imports rewritten; its test files."""
    root = target / suite.folder
    tests = [path for pattern in suite.tests for path in sorted(checkout.glob(pattern))]
    for path in (*tests, *_sources(checkout, suite.copied)):
        copy = root / path.relative_to(checkout)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
    return [root / path.relative_to(checkout) for path in tests]


def _sources(checkout: Path, copied: tuple[str, ...]) -> list[Path]:
    found = [checkout / name for name in copied]
    return [source for path in found for source in (path.rglob("*.py") if path.is_dir() else [path])]


def run_files(tests: list[Path], root: Path, words: str) -> list[Outcome]:
    """Run files in one process, which imports torch once; one by one where that process did not come to its end."""
    xml = root / "report.xml"
    xml.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": f"{root.parent}{os.pathsep}{ROOT}", "PYTHONWARNINGS": "ignore"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        str(root),
        "--import-mode=importlib",
    ]
    command += ["-p", "no:cacheprovider", "--junitxml", str(xml), *(["-k", words] if words else []), *map(str, tests)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=root, env=environment, timeout=LIMIT * len(tests), check=False
        )
        said = f"pytest ended with {done.returncode}: {done.stdout[-600:]}{done.stderr[-600:]}"
        ended = done.returncode in {0, 1, 5} and xml.exists()
    except subprocess.TimeoutExpired:
        said, ended = f"no end after {LIMIT * len(tests)} s", False
    if ended:
        return outcomes(xml.read_text(encoding="utf-8"))
    if len(tests) > 1:
        return [outcome for test in tests for outcome in run_files([test], root, words)]
    return [Outcome(str(tests[0].relative_to(root)), "failed", said)]


def outcomes(xml: str) -> list[Outcome]:
    """What a report of pytest says, test by test."""
    found = []
    for case in ET.fromstring(xml).iter("testcase"):
        module, _, owner = (case.get("classname") or "").rpartition(".")
        test = "::".join((f"{module.replace('.', '/')}.py", owner, case.get("name") or ""))
        bad = next((part for part in case if part.tag in {"failure", "error"}), None)
        if bad is not None:
            found.append(Outcome(test, "failed", _last_line(bad)))
        elif any(part.tag == "skipped" for part in case):
            found.append(Outcome(test, "skipped"))
        else:
            found.append(Outcome(test, "passed"))
    return found


def _last_line(failure: ET.Element) -> str:
    """What pytest says of the failure: the message, and where it was raised."""
    text = failure.text or ""
    raised = re.findall(r"^E   +(.*)$", text, re.MULTILINE)
    return " | ".join([failure.get("message") or "", *raised[:12]])[:2000]
