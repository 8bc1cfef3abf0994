"""Constants in their short forms: the same values in fewer bytes, and nothing writes to them."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.errors import Quant2eError
from quant2e.graph.qdq_ops import qd
from quant2e.stored_tensor import StoredTensor
from quant2e.weights.short_form import INTEGERS, ShortKind, in_short_form, short_form, shortened


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


@given(integers(), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_so_do_some_of_their_rows(value, repeats, data):
    form = short_form(value, repeats=repeats)
    if form is None:
        return
    first = data.draw(st.integers(0, value.shape[0] - 1))
    rows = slice(first, data.draw(st.integers(first + 1, value.shape[0])))
    some = form.rows(form.pack(value), rows)
    assert (some.dtype, some.shape) == (value.dtype, value[rows].shape)
    assert torch.equal(some, value[rows])


GROUP = 32


@pytest.mark.parametrize("given_zeros", [True, False])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [300, 301, 4100])
def test_groups_are_dequantized_block_by_block_to_the_same_bits(rows, out, scale_dtype, given_zeros, monkeypatch):
    seed = torch.Generator().manual_seed(rows)
    q = torch.randint(-8, 8, (rows, 256), generator=seed, dtype=torch.int8)
    scales = torch.rand(rows, 256 // GROUP, generator=seed).to(scale_dtype).float()
    zeros = torch.randint(-8, 8, scales.shape, generator=seed, dtype=torch.int32) if given_zeros else None
    asked = (-8, 7, torch.int8, GROUP, out)
    whole = qd.dequantize_per_channel_group(q, scales, zeros, *asked)
    stored = [in_short_form(tensor, repeats=False) for tensor in (q, scales)]
    assert shortened(stored[0]) is not None
    monkeypatch.setattr(StoredTensor, "read", lambda _: pytest.fail("all at once"), raising=True)
    scales = scales if shortened(stored[1]) is None else shortened(stored[1]).read()
    assert torch.equal(qd.dequantize_per_channel_group(stored[0], scales, zeros, *asked), whole)


def test_groups_that_are_not_those_of_rows_are_dequantized_whole():
    q = torch.randint(-8, 8, (40, 256), dtype=torch.int8)
    scales, zeros = torch.rand(40 * 8), torch.zeros(40 * 8, dtype=torch.int32)
    whole = qd.dequantize_per_channel_group(q, scales, zeros, -8, 7, torch.int8, GROUP, torch.float32)
    stored = in_short_form(q, repeats=False)
    assert torch.equal(
        qd.dequantize_per_channel_group(stored, scales, zeros, -8, 7, torch.int8, GROUP, torch.float32), whole
    )


@pytest.mark.parametrize(("value", "repeats", "kind", "share"), [
    (torch.arange(16384).remainder(16).to(torch.int8) - 8, False, ShortKind.PACKED, 1 / 2),
    (torch.arange(16384).remainder(4).to(torch.int32), True, ShortKind.PACKED, 1 / 16),
    (torch.zeros(16384, dtype=torch.int32), True, ShortKind.REPEATED, 1 / 16384),
    (torch.zeros(16384, dtype=torch.int8), False, ShortKind.PACKED, 1 / 4),
    (torch.arange(16384).remainder(256), True, ShortKind.CAST, 1 / 8),
    (torch.arange(16384).bfloat16().float(), False, ShortKind.CAST, 1 / 2),
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
