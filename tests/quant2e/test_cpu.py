"""Which instruction sets saturate, and which weights are small enough for those that do."""

import itertools
import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e import AnnotationError
from quant2e.cpu import LANE, TARGETS, InstructionSet, detect, extreme_weights, may_overflow, pair_sums, pairs_fit


@pytest.fixture
def cpu(monkeypatch):
    """Pretend to be a CPU with some features."""

    def pretend(*features, machine="x86_64"):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True))

    return pretend


WIDE = ("avx2", "avx512_f", "avx512_vnni")


@pytest.mark.parametrize(
    ("features", "environment", "expected"),
    [
        (("avx2",), {}, InstructionSet("AVX2", saturates=True)),
        (("avx2", "avx_vnni"), {}, InstructionSet("AVX2 VNNI", saturates=False)),
        (("avx2", "avx512_f"), {}, InstructionSet("AVX512", saturates=True)),
        (WIDE, {}, InstructionSet("AVX512 VNNI", saturates=False)),
        ((*WIDE, "amx_tile"), {}, InstructionSet("AMX", saturates=False)),
        (WIDE, {"ONEDNN_MAX_CPU_ISA": "avx2"}, InstructionSet("AVX512 VNNI limited to AVX2", saturates=True)),
        (WIDE, {"DNNL_MAX_CPU_ISA": "AVX512_CORE"},
            InstructionSet("AVX512 VNNI limited to AVX512_CORE", saturates=True)),
        (WIDE, {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, InstructionSet("AVX512 VNNI limited to AVX2_VNNI", saturates=True)),
        ((*WIDE, "avx_vnni"), {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
            InstructionSet("AVX512 VNNI limited to AVX2_VNNI", saturates=False)),
        (WIDE, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, InstructionSet("AVX512 VNNI", saturates=False)),
        (WIDE, {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, InstructionSet("AVX512 VNNI", saturates=False)),
        (WIDE, {"ONEDNN_MAX_CPU_ISA": ""}, InstructionSet("AVX512 VNNI", saturates=False)),
    ],
)  # fmt: skip
def test_detect(cpu, features, environment, expected):
    cpu(*features)
    assert detect(environment) == expected


def test_other_architectures_have_no_such_lane(cpu):
    cpu(machine="aarch64")
    assert detect({}) == InstructionSet("aarch64", saturates=False)


ABLE, NARROW, UNABLE = ("avx512_vnni",), ("avx_vnni",), ("avx2",)


@pytest.mark.parametrize(
    ("machine", "features", "limit", "saturates"),
    [
        ("x86_64", ABLE, "", False),
        ("x86_64", NARROW, "", False),
        ("x86_64", UNABLE, "", True),
        ("x86_64", ABLE, "AVX2", True),
        ("x86_64", ABLE, "avx512_core", True),
        ("x86_64", ABLE, "AVX512_CORE_VNNI", False),
        ("x86_64", ABLE, "AVX2_VNNI", True),
        ("x86_64", NARROW, "AVX2_VNNI", False),
        ("aarch64", (), "", False),
    ],
)
def test_which_machines_add_in_16_bits(cpu, machine, features, limit, saturates):
    cpu(*features, machine=machine)
    assert detect({"ONEDNN_MAX_CPU_ISA": limit} if limit else {}).saturates is saturates


@pytest.mark.parametrize("features", [("avx2",), ("avx_vnni",), WIDE, (*WIDE, "avx_vnni"), (*WIDE, "amx_tile")])
def test_limits_forbid_what_comes_after_them(cpu, features):
    for machine in ("x86_64", "AMD64"):
        cpu(*features, machine=machine)
        own = detect({}).saturates
        assert own is (features == ("avx2",))
        for limit in ("SSE41", "AVX", "AVX2", "AVX512_CORE"):
            assert detect({"ONEDNN_MAX_CPU_ISA": limit}).saturates
        for limit in ("AVX2_VNNI", "AVX2_VNNI_2"):
            assert detect({"ONEDNN_MAX_CPU_ISA": limit}).saturates is ("avx_vnni" not in features)
        for limit in ("", "AVX512_CORE_VNNI", "DEFAULT"):
            assert detect({"ONEDNN_MAX_CPU_ISA": limit}).saturates is own
    cpu(*features, machine="aarch64")
    assert not detect({"ONEDNN_MAX_CPU_ISA": "AVX2"}).saturates


@pytest.mark.parametrize("name", TARGETS)
def test_names(name):
    assert InstructionSet.of(name) is InstructionSet.of(name.upper().replace("_", " ")) is TARGETS[name]
    assert InstructionSet.of(TARGETS[name]) is TARGETS[name]


def test_unknown_names():
    with pytest.raises(AnnotationError, match=r"isa='avx9' is not known: choose one of amx, avx2, avx2_vnni"):
        InstructionSet.of("avx9")


def test_this_machine(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    assert InstructionSet.of(None) == detect() == detect({})


# ---------------------------------------------------------------- the bound


@pytest.mark.parametrize(
    ("rows", "extremes", "sums"),
    [
        ([[3, -1, 2, -5]], [[3, 2, -5, -1]], [[5, -6]]),
        ([[3, 1, 2]], [[3, 2, 0, 0]], [[5, 0]]),  # no negative number: nothing is added to a small one
        ([[-3]], [[0, 0, -3, 0]], [[0, -3]]),
        ([[], []], [[0, 0, 0, 0]] * 2, [[0, 0]] * 2),
    ],
)
def test_extreme_weights(rows, extremes, sums):
    found = extreme_weights(torch.tensor(rows, dtype=torch.int32))
    assert found.tolist() == extremes
    assert pair_sums(found).tolist() == sums
    assert torch.equal(extreme_weights(torch.tensor(rows, dtype=torch.float32)), found.float())


def test_each_channel_fits_or_not():
    weights = torch.tensor([[127, 127], [1, 1], [-64, -65], [-64, -64]], dtype=torch.int32)
    assert pairs_fit(extreme_weights(weights), 255).tolist() == [False, True, False, True]


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
        ([[-128, -128]], 128, False),  # -32768, the smallest number that a lane holds
        ([[127, 127]], 129, False),  # 32766
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
    overflows = max(lanes) > LANE.max or min(lanes) < LANE.min
    assert may_overflow(torch.tensor([weights], dtype=torch.int8), largest) is overflows


def test_convolution_weights_count_as_one_row_per_output_channel():
    weights = torch.zeros(2, 3, 2, 2, dtype=torch.int8)
    weights[1, 0, 0, 0], weights[1, 2, 1, 1] = 100, 100
    assert may_overflow(weights, 255)
    assert not may_overflow(weights[:1], 255)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
def test_no_weights_overflow_nothing(shape):
    assert not may_overflow(torch.zeros(shape, dtype=torch.int8), 255)
