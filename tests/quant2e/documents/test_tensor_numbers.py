"""Numbers of a tensor are those of a tuple, and one tensor is all that they hold."""

import copy
import pickle

import pytest
import torch

from quant2e.documents.tensor_numbers import TensorNumbers, plain_numbers, tensor_of
from quant2e.stored_tensor import StoredTensor
from quant2e.weights.short_form import in_short_form

FLOATS = torch.tensor([[0.1, 0.25], [3.0, 1e-7]])
DECIMALS = (0.1, 0.25, 3.0, 1e-7)


@pytest.mark.parametrize(
    ("tensor", "numbers"),
    [
        (FLOATS, DECIMALS),
        (FLOATS.double(), DECIMALS),
        (FLOATS.to(torch.bfloat16), (0.10009765625, 0.25, 3.0, 1.0011717677116394e-07)),
        (torch.tensor([3, -2, 0], dtype=torch.int32), (3, -2, 0)),
        (torch.tensor([], dtype=torch.int8), ()),
    ],
    ids=str,
)
def test_they_are_a_tuple_of_pythons_numbers(tensor, numbers):
    made = TensorNumbers(tensor)
    expected = tuple(float(str(torch.tensor(n).numpy())) if type(n) is float else n for n in numbers)
    assert made == expected
    assert expected == made
    assert tuple(made) == plain_numbers(made) == made[:] == expected
    assert [type(number) for number in made] == [type(number) for number in expected]
    assert hash(made) == hash(expected)
    assert made == TensorNumbers(tensor.clone())
    assert (*expected, 1) != made
    assert [made[place] for place in range(-len(made), len(made))] == [*expected, *expected]
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made


def test_one_number_makes_a_difference():
    made = TensorNumbers(torch.arange(100))
    assert made != TensorNumbers(torch.arange(100) + (torch.arange(100) == 99))
    assert made != (*range(99), 0)
    assert made != list(range(100))
    assert repr(made) == "(0, 1, 2, … 100 numbers)"
    assert repr(TensorNumbers(FLOATS)) == repr(DECIMALS)


def test_integers_equal_floats_as_pythons_do():
    assert TensorNumbers(torch.tensor([1, 2])) == TensorNumbers(torch.tensor([1.0, 2.0])) == (1, 2)


def test_a_tensor_in_its_short_form_is_read():
    zeros = torch.zeros(1000, dtype=torch.int32)
    short = in_short_form(zeros, repeats=True)
    assert isinstance(short, StoredTensor)
    assert short.place.stored.numel() == 1
    assert TensorNumbers(short) == (0,) * 1000


def test_either_kind_becomes_a_tensor():
    assert tensor_of(TensorNumbers(FLOATS)).tolist() == FLOATS.flatten().tolist()
    assert (tensor_of((1, 2)).dtype, tensor_of((1, 2.5)).dtype) == (torch.int64, torch.float64)
    assert tensor_of((1 << 70,)).item() == 2.0**70
