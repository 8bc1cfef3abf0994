"""The planted bugs still find their places; that tests find the bugs is said by ``make mutants``."""

from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.__main__ import page, plant
from tests.mutants.table import MUTANTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_can_be_planted(mutant, tmp_path):
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    assert all((ROOT / test.partition("::")[0]).exists() for test in mutant.tests)
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    (tmp_path / mutant.file).write_text(source, encoding="utf-8")
    assert plant(tmp_path, mutant) == source
    planted = (tmp_path / mutant.file).read_text(encoding="utf-8")
    assert planted != source
    if mutant.file.endswith(".py"):
        compile(planted, mutant.file, "exec")


def test_there_are_enough():
    assert len(MUTANTS) >= 25
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1


def test_a_place_that_is_gone_is_said(tmp_path):
    (tmp_path / MUTANTS[0].file).parent.mkdir(parents=True)
    (tmp_path / MUTANTS[0].file).write_text("", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds its text 0 times"):
        plant(tmp_path, MUTANTS[0])


def test_the_page_of_nothing():
    assert page([], 0.0).startswith("0 of 0 planted bugs were found")
