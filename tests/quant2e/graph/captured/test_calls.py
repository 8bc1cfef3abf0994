"""A batch as a call, and so are example inputs."""

from collections import UserDict

import pytest
import torch

from quant2e.errors import CaptureError
from quant2e.graph.captured.calls import Call, call_of, example_call


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (1, ((1,), {})),
        ((1, 2), ((1, 2), {})),
        ([1], ((1,), {})),
        ({"a": 1}, ((), {"a": 1})),
        (Call((1,), {"a": 2}), ((1,), {"a": 2})),
    ],
)
def test_a_batch_is_one_input_a_tuple_or_a_dict(batch, expected):
    assert call_of(batch) == expected


def test_a_copied_call_has_tensors_of_its_own():
    x = torch.zeros(2)
    copied = Call((x, [x, 3]), {"mask": x, "flag": None}).copied()
    assert isinstance(copied, Call)
    copied.args[0].add_(1)
    assert x.tolist() == [0.0, 0.0]
    assert (copied.args[1][1], copied.kwargs["flag"]) == (3, None)


X = torch.zeros(2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (X, ((X,), {})),
        ([X], ((X,), {})),
        ((X, 3), ((X, 3), {})),
        (None, ((), {})),
        ({"x": X}, ((), {"x": X})),
        (UserDict(x=X), ((), {"x": X})),
        (Call((X,), {"n": 3}), ((X,), {"n": 3})),
    ],
)
def test_example_inputs_are_a_call(given, expected):
    found = example_call(given, {"flag": True})
    assert found.args == expected[0]
    assert found.kwargs == {**expected[1], "flag": True}


def test_what_could_mean_one_input_or_several_is_refused():
    with pytest.raises(CaptureError, match=r"is a int: .* use a tuple, \(value,\)"):
        example_call(3)
    with pytest.raises(CaptureError, match="x: given in example_inputs and in kwargs; give each once"):
        example_call({"x": X, "y": X}, {"x": X})
