"""Conditions on inputs: they are interpreted, and can do nothing else."""

from __future__ import annotations

import contextlib
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant2e.graph.captured.conditions import Condition, ConditionError, guard_text, path_of

MARK = "QUANT2E_TEST_CONDITIONS"
PATHS = {path_of(text): index for index, text in enumerate(["x", "n", "b['it\\'s'][0]", "flag", "p.field", "mode"])}
LEAVES = (torch.zeros(6, 4, 3), 12, torch.zeros(5, dtype=torch.int8), True, None, "fast")

HOLD = [
    "x.dim() == 3",
    "x.ndim == 3 and x.shape[1] == 4",
    "x.size()[0] % 2 == 0",
    "2 <= x.size()[0] <= 6",
    "not (x.size()[0] > 6 or x.size()[1] != 4)",
    "x.stride()[0] == x.size()[1] * x.size()[2] and x.storage_offset() == 0",
    "n == 12",
    "-n + 13 == +1",
    "(n - 2) // 3 == 3",
    "n / 8 == 1.5",
    "2 ** 3 ** 2 == 512",
    "-2 ** 2 == -4",
    "max(1, n, 3) == 12 and min(x.size()[0], 9) == 6",
    "math.floor(n / 5) == 2 and math.ceil(n / 5) == 3 and math.trunc(2.5) == 2",
    "n < math.inf and not math.isnan(n)",
    "torch.sym_float(n) == 12.0",
    "IsNonOverlappingAndDenseIndicator(6, 4, 3, 12, 3, 1) == 1",
    "b['it\\'s'][0].size()[0] == 5",
    "str(b['it\\'s'][0].dtype) == 'torch.int8'",
    "flag == True",
    "p.field is None",
    "mode == 'fast' and mode != \"slow\"",
    "1 + x.size()[0] % 3 == 1",
]
FAIL = [
    "x.dim() == 2",
    "x.size()[7] == 1",
    "n.size()[0] == 1",
    "x == 3",
    "x < 3",
    "mode < 3",
    "n // 0 == 1",
    "str(mode) == 'fast'",
    "math.sqrt(-n) == 1",
    "10 ** 60 ** 60 == 1",
    "p.field is True",
]


@pytest.mark.parametrize("text", HOLD)
def test_what_holds(text):
    assert Condition(text, PATHS).holds(LEAVES)


@pytest.mark.parametrize("text", FAIL)
def test_what_does_not(text):
    assert not Condition(text, PATHS).holds(LEAVES)


CODE = f"__import__('os').environ.__setitem__({MARK!r}, '1')"
UNREADABLE = [
    "",
    CODE,
    f"n == 12 or {CODE}",
    f"n == 12, {CODE}",
    f"n == 12; {CODE}",
    "(lambda: 1)()",
    "[1 for i in x][0]",
    "x.__class__",
    "x.size",
    "x.item()",
    "x.size()[0].__class__",
    "x.size()[n]",
    "x.data.size()[0] == 1",
    "unknown == 1",
    "math.__loader__",
    "math.factorial(9)",
    "max.__self__",
    "max",
    "exec('1')",
    "getattr(x, 'y')",
    "f'{x}'",
    "n := 3",
    "n if flag else 3",
    "n == 1 if flag else 3",
    "n ==",
    "n == 1 2",
    "'a' 'b' == 1",
    "b['other'] == 1",
    "(" * 100 + "n" + ")" * 100 + " == 12",
    "-" * 30_000 + "1 == 1",
    "n == " + "1" * 50,
    "n == 1\n\n@",
]


@pytest.mark.parametrize("text", UNREADABLE, ids=range(len(UNREADABLE)))
def test_what_is_no_condition(text):
    with pytest.raises(ConditionError):
        Condition(text, PATHS)
    assert MARK not in os.environ


@given(st.text(st.sampled_from("xn()[]'.,=<>!%*/+-0123456789andornot isL size dim \\\"\n"), max_size=60))
def test_any_text_is_a_condition_or_an_error(text):
    with contextlib.suppress(ConditionError):
        Condition(text, PATHS).holds(LEAVES)


ATOMS = st.sampled_from(["n", "x.size()[0]", "x.size()[1]", "3", "7"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner).map(" ".join)
        | inner.map(lambda text: f"({text})")
        | st.tuples(inner, inner).map(lambda pair: f"max({pair[0]}, {pair[1]})")
    ),
    max_leaves=8,
)


@given(EXPRESSIONS, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), EXPRESSIONS)
def test_arithmetic_is_that_of_python(left, mark, right):
    text = f"{left} {mark} {right}"
    try:
        expected = eval(text, {"x": LEAVES[0], "n": LEAVES[1], "math": math})
    except ZeroDivisionError:
        expected = False
    assert Condition(text, PATHS).holds(LEAVES) == expected


@pytest.mark.parametrize(
    ("guard", "text"),
    [
        ("L['x'].size()[0]*2 <= 8", "x.size()[0] * 2 <= 8"),
        ("L['b']['k'].size()[1] == L['args'][1].size()[0]", "b['k'].size()[1] == args_1.size()[0]"),
        ("L['flat_args'][2].size()[0] != 1", "args_1.size()[0] != 1"),
        ("not(-L['x'].size()[0] + 3 < (-1))", "not (-x.size()[0] + 3 < (-1))"),
        ("max(1, L['x'].size()[0]) > 3 and(1 + 2) > 2", "max(1, x.size()[0]) > 3 and (1 + 2) > 2"),
    ],
)
def test_guards_of_torch(guard, text):
    assert guard_text(guard, ["x", "b", "args_1"], ["x", "b['k']", "args_1"]) == text


@pytest.mark.parametrize("guard", ["L['y'].size()[0] == 1", "L['self'].training", "L['flat_args'][9] == 1"])
def test_guards_about_what_is_no_input(guard):
    with pytest.raises(ConditionError, match="no input"):
        guard_text(guard, ["x"], ["x"])


@pytest.mark.parametrize("text", ["'a' * 3000000000 != 'b'", "'%1000000000d' % 1 != 'b'", "'a' + 'b' == 'ab'"])
def test_text_is_compared_and_not_computed(text):
    assert not Condition(text, {}).holds([])
