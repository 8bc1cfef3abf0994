"""Which instruction sets saturate, and that the lowering thinks the same."""

import itertools
import platform

import pytest
import torch

from lowering.inductor.saturation import adds_in_16_bits
from quant2e import AnnotationError
from quant2e.cpu import TARGETS, InstructionSet, detect


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
        (WIDE, {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, InstructionSet("AVX512 VNNI limited to AVX512_CORE", saturates=True)),
        (WIDE, {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, InstructionSet("AVX512 VNNI limited to AVX2_VNNI", saturates=True)),
        ((*WIDE, "avx_vnni"), {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, InstructionSet("AVX512 VNNI limited to AVX2_VNNI", saturates=False)),
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


def test_the_lowering_guards_exactly_the_machines_that_saturate(cpu):
    """The quantizer and the lowering do not know each other, and must agree."""
    limits = ("", "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "DEFAULT")
    features = (("avx2",), ("avx_vnni",), WIDE, (*WIDE, "avx_vnni"), (*WIDE, "amx_tile"))
    for machine, able, limit in itertools.product(("x86_64", "AMD64", "aarch64"), features, limits):
        cpu(*able, machine=machine)
        environment = {"ONEDNN_MAX_CPU_ISA": limit}
        assert detect(environment).saturates is adds_in_16_bits(environment), (machine, able, limit)


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
