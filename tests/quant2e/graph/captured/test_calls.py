"""A batch as a call, and example inputs as a tuple."""

import pytest
import torch

from quant2e.errors import CaptureError
from quant2e.graph.captured.calls import Call, call_of, positional_inputs


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


@pytest.mark.parametrize(("given", "expected"), [(X, (X,)), ([X], (X,)), ((X, 3), (X, 3)), (None, ())])
def test_example_inputs_are_a_tuple(given, expected):
    found = positional_inputs(given)
    assert len(found) == len(expected)
    assert all(one is other for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [({"x": X}, "is a dict: for keyword inputs use kwargs=, for one"), (3, r"is a int: .* use a tuple, \(value,\)")],
)
def test_what_could_mean_one_input_or_several_is_refused(given, message):
    with pytest.raises(CaptureError, match=message):
        positional_inputs(given)
