"""Which instruction sets saturate."""

import platform

import pytest
import torch

from quantizers.isa import InstructionSet, detect


@pytest.fixture
def cpu(monkeypatch):
    """Pretend to be a CPU with some features."""

    def pretend(*features, machine="x86_64"):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        for name in ("amx_tile", "vnni", "avx512"):
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda n=name: n in features)

    return pretend


@pytest.mark.parametrize(
    ("features", "environment", "expected"),
    [
        ((), {}, InstructionSet("AVX2", saturates=True)),
        (("avx512",), {}, InstructionSet("AVX512", saturates=True)),
        (("avx512", "vnni"), {}, InstructionSet("AVX512 VNNI", saturates=False)),
        (("avx512", "vnni", "amx_tile"), {}, InstructionSet("AMX", saturates=False)),
        (("avx512", "vnni"), {"ONEDNN_MAX_CPU_ISA": "avx2"}, InstructionSet("AVX512 VNNI limited to AVX2", saturates=True)),
        (("avx512", "vnni"), {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, InstructionSet("AVX512 VNNI limited to AVX512_CORE", saturates=True)),
        (("avx512", "vnni"), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, InstructionSet("AVX512 VNNI", saturates=False)),
        (("avx512", "vnni"), {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, InstructionSet("AVX512 VNNI", saturates=False)),
        (("avx512", "vnni"), {"ONEDNN_MAX_CPU_ISA": ""}, InstructionSet("AVX512 VNNI", saturates=False)),
    ],
)  # fmt: skip
def test_detect(cpu, features, environment, expected):
    cpu(*features)
    assert detect(environment) == expected


def test_other_architectures_have_no_such_lane(cpu):
    cpu(machine="aarch64")
    assert detect({}) == InstructionSet("aarch64", saturates=False)


def test_this_machine(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    assert detect() == detect({})
