"""Every mistake of `broken` is found, with the kind, the rule and the op that are to blame."""

import pytest

from quantizers.conformance import KINDS, check
from tests.quantizers.conformance.broken import BROKEN, Sound

MEETINGS = {"overlapping patterns": 25}
"""Random graphs for mistakes that show only where certain ops meet."""


def test_the_sound_one_passes():
    report = check(Sound, examples=2, seconds=600)
    assert report.passed, report
    assert all(report.reached.values())


@pytest.mark.parametrize("mistake", BROKEN)
def test_found(mistake):
    quantizer, kind, rule, op, words = BROKEN[mistake]
    report = check(quantizer, examples=MEETINGS.get(mistake, 2), seconds=600)
    assert not report.passed
    found = [f for f in report.errors if f.kind == kind]
    assert found, report
    told = next(
        (f for f in found if rule in (None, f.rule) and (op is None or op in f.op) and words in f.message), None
    )
    assert told is not None, report
    assert kind in KINDS
    if kind != "never reached":
        assert len(told.reproducer.steps) <= 5
        told.reproducer.module()(*told.reproducer.batches(1)[0])
