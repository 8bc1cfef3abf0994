"""The code of docs/writing_a_quantizer.md, run as it stands; what it prints is what the page shows."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from quantizers.conformance import KINDS, check

PAGE = (Path(__file__).parents[1] / "docs" / "writing_a_quantizer.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TEXT = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def page():
    """What the page defines and prints, up to the conformance check."""
    namespace = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, block in enumerate(CODE[:-1]):
            exec(compile(block, f"writing_a_quantizer.md, block {number}", "exec"), namespace)
    return namespace, re.sub(r" at [^\n]*`: ", ": ", printed.getvalue())


def test_the_quantizer_is_short_and_everything_runs_in_integers(page):
    assert len(CODE[0].splitlines()) < 60
    namespace, _ = page
    report = namespace["quant2e"].integer_report(namespace["integers"])
    assert report.left == ()
    assert sum(verdict.integer for verdict in report.verdicts) == len(report.verdicts) == 16


def test_explanations_are_those_of_the_page(page):
    assert page[1] == TEXT[0]


@pytest.mark.slow
def test_it_conforms(page):
    exec(compile(CODE[-1], "writing_a_quantizer.md, conformance", "exec"), page[0])
    assert all(page[0]["report"].reached.values())


def test_the_finding_is_that_of_the_page(page):
    namespace, _ = page
    forgetful = namespace["Rule"](
        namespace["clamp"](namespace["mac"]), {"w": namespace["WEIGHT"]}, namespace["ACT"], name="mac"
    )
    quantizer = type("Forgetful", (namespace["RuleQuantizer"],), {"rules": (forgetful,)})
    findings = check(quantizer, examples=1, seconds=600).errors
    assert TEXT[1].strip() in {str(finding).partition("\n")[0] for finding in findings}


def test_every_kind_of_finding_is_explained():
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE))
    assert {kind: rows.get(kind) for kind in KINDS} == KINDS
