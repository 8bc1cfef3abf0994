"""Constants in their short forms: the same values in fewer bytes, and nothing writes to them."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.errors import Quant2eError
from quant2e.stored_tensor import StoredTensor
from quant2e.weights.short_form import INTEGERS, Kind, in_short_form, short_form, shortened


@st.composite
def integers(draw):
    """Integers of some bits, anywhere in a dtype, in a shape whose sizes need not be even."""
    dtype = draw(st.sampled_from(INTEGERS))
    bits = draw(st.sampled_from([1, 2, 3, 4, 5, 8]))
    bounds = torch.iinfo(dtype)
    low = draw(st.integers(max(bounds.min, -1000), min(bounds.max, 1000) - (1 << bits) + 1))
    shape = draw(st.sampled_from([(9001,), (81, 97), (80, 97), (81, 96), (4, 1, 2500), (1, 9001), (3, 3, 1001)]))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return (torch.randint(0, 1 << bits, shape, generator=seed) + low).to(dtype)


@given(integers(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_values_come_back(value, repeats):
    form = short_form(value, repeats=repeats)
    if form is None:
        return
    stored = form.pack(value)
    assert (tuple(stored.shape), stored.dtype) == (form.stored_shape, form.stored_dtype)
    assert stored.nbytes == form.stored_bytes < value.nbytes
    again = form.unpack(stored)
    assert (again.dtype, again.stride()) == (value.dtype, value.stride())
    assert torch.equal(again, value)


@pytest.mark.parametrize(("value", "repeats", "kind", "share"), [
    (torch.arange(16384).remainder(16).to(torch.int8) - 8, False, Kind.PACKED, 1 / 2),
    (torch.arange(16384).remainder(4).to(torch.int32), True, Kind.PACKED, 1 / 16),
    (torch.zeros(16384, dtype=torch.int32), True, Kind.REPEATED, 1 / 16384),
    (torch.zeros(16384, dtype=torch.int8), False, Kind.PACKED, 1 / 4),
    (torch.arange(16384).remainder(256), True, Kind.CAST, 1 / 8),
    (torch.arange(16384).bfloat16().float(), False, Kind.CAST, 1 / 2),
])  # fmt: skip
def test_each_form_takes_so_many_bytes(value, repeats, kind, share):
    short = in_short_form(value, repeats=repeats)
    place = shortened(short)
    assert place.form.kind is kind
    assert place.stored.nbytes == share * value.nbytes
    assert torch.equal(short + 0, value)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(16384).remainder(256).to(torch.uint8),
        torch.full((16384,), 0.1),
        torch.arange(16384).double(),
        torch.zeros(400, dtype=torch.int8),
        torch.zeros(128, 128, dtype=torch.int8).t()[::2],
        torch.zeros(128, 128, dtype=torch.int8, device="meta"),
    ],
)
def test_others_stay_as_they_are(value):
    assert in_short_form(value, repeats=True) is value
    assert shortened(value) is None


def test_they_are_read_copied_and_pickled_and_never_written_to():
    value = torch.arange(16384).remainder(16).to(torch.int8)
    short = in_short_form(value, repeats=False)
    assert isinstance(short, StoredTensor)
    assert (short.shape, short.dtype, short.place.shape) == (value.shape, value.dtype, tuple(value.shape))
    for other in (copy.deepcopy(short), pickle.loads(pickle.dumps(short))):
        assert torch.equal(other.read(), value)
    with pytest.raises(Quant2eError, match=r"add_.* writes to a constant in its short form, several integers share"):
        short.add_(1)
    assert math.prod(short.read().shape) == value.numel()
