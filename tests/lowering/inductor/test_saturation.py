import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowering.inductor.saturation import adds_in_16_bits, may_overflow

INT16 = torch.iinfo(torch.int16)


@pytest.mark.parametrize(
    ("weights", "largest", "overflows"),
    [
        ([[127, 127]], 127, False),  # 127 · 254 = 32258
        ([[-128, -128]], 127, False),  # 127 · -256 = -32512
        ([[64, 64]], 255, False),  # 255 · 128 = 32640
        ([[65, 64]], 255, True),  # 255 · 129 = 32895
        ([[-64, -64]], 255, False),  # -32640
        ([[-64, -65]], 255, True),  # -32895
        ([[127, -127]], 255, False),  # a lane with both is smaller than either
        ([[127]], 255, False),  # one weight alone: 32385
        ([[1, 1], [100, 100]], 255, True),  # one channel is enough
    ],
)
def test_bound(weights, largest, overflows):
    assert may_overflow(torch.tensor(weights, dtype=torch.int8), largest) is overflows


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-128, 127), min_size=2, max_size=6),
    st.integers(1, 255),
)
def test_the_bound_is_that_of_the_worst_packing_and_the_worst_activations(weights, largest):
    lanes = [a * w + b * v for w, v in itertools.combinations(weights, 2) for a in (0, largest) for b in (0, largest)]
    overflows = max(lanes) > INT16.max or min(lanes) < INT16.min
    assert may_overflow(torch.tensor([weights], dtype=torch.int8), largest) is overflows


def test_convolution_weights_count_as_one_row_per_output_channel():
    weights = torch.zeros(2, 3, 2, 2, dtype=torch.int8)
    weights[1, 0, 0, 0], weights[1, 2, 1, 1] = 100, 100
    assert may_overflow(weights, 255)
    assert not may_overflow(weights[:1], 255)


ABLE, NARROW, UNABLE = {"avx512_vnni": True}, {"avx_vnni": True}, {"avx2": True}


@pytest.mark.parametrize(
    ("machine", "able", "limit", "saturates"),
    [
        ("x86_64", ABLE, "", False),
        ("x86_64", NARROW, "", False),
        ("x86_64", UNABLE, "", True),
        ("x86_64", ABLE, "AVX2", True),
        ("x86_64", ABLE, "avx512_core", True),
        ("x86_64", ABLE, "AVX512_CORE_VNNI", False),
        ("x86_64", ABLE, "AVX2_VNNI", True),
        ("x86_64", NARROW, "AVX2_VNNI", False),
        ("aarch64", {}, "", False),
    ],
)
def test_which_machines_add_in_16_bits(machine, able, limit, saturates, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
    assert adds_in_16_bits({"ONEDNN_MAX_CPU_ISA": limit} if limit else {}) is saturates
