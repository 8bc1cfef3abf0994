"""The list of tests that were measured to be long names tests that there are, each once."""

import ast
from pathlib import Path

from tests.conftest import long_tests

ROOT = Path(__file__).parents[1]


def functions(file):
    """Names of the functions of a file, those of classes too."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_each_is_there_once():
    names = long_tests()
    assert len(names) == len(set(names))
    assert names == sorted(names)
    known = {file: functions(file) for file in {name.partition("::")[0] for name in names}}
    gone = [name for name in names if name.partition("[")[0].rpartition("::")[2] not in known[name.partition("::")[0]]]
    assert gone == []
