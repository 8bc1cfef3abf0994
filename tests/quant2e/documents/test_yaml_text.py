"""YAML is read strictly, and only as plain data."""

import pytest

from quant2e.documents.yaml_text import read_yaml, yaml_text
from quant2e.errors import FileFormatError

pytest.importorskip("yaml")


def test_there_and_back():
    data = {"b": [1, 2.5, None, True], "a": {"ä": "text"}}
    assert read_yaml(yaml_text(data), "it") == data
    assert list(read_yaml(yaml_text(data), "it")) == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "'a' stands twice"),
        ("b: {a: 1, a: 2}", "'a' stands twice"),
        ("a: .nan", "nan is no number"),
        ("a: [.inf]", "inf is no number"),
        ("1: 2", "is no text"),
        ("a: 2020-01-01", "is a date"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("a: [", "it is not YAML"),
    ],
)
def test_what_is_refused(text, said):
    with pytest.raises(FileFormatError, match=said):
        read_yaml(text, "it")
