"""The golden texts themselves: stored, compared, and told apart with a diff."""

import pytest


@pytest.fixture
def make(golden, tmp_path):
    return lambda *, update: type(golden)(tmp_path, update)


def test_stored_once_compares_equal_afterwards(make, tmp_path):
    make(update=True)("plans/conv", "a\nb")
    assert (tmp_path / "plans" / "conv.txt").read_text() == "a\nb\n"
    make(update=False)("plans/conv", "a\nb\n\n")


def test_a_difference_fails_with_a_diff(make):
    make(update=True)("x", "a\nb")
    with pytest.raises(pytest.fail.Exception, match=r"-b\n\+c\n"):
        make(update=False)("x", "a\nc")


def test_a_missing_text_fails_and_says_how_to_make_it(make):
    with pytest.raises(pytest.fail.Exception, match="--update-golden"):
        make(update=False)("nowhere", "a")
