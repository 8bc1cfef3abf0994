"""Which ranges a policy gives on which machine, what the report says of it, and what cannot be asked for."""

import pytest
import torch
from torch import nn

from quant2e import AnnotationError
from quant2e.annotation.config import QuantizationConfig
from quant2e.annotation.specs import QuantizationSpec
from quant2e.observers.measuring import MinMaxObserver
from quantizers import InstructionSet, X86InductorQuantizer
from quantizers import get_default_x86_inductor_quantization_config as config
from quantizers import get_x86_inductor_linear_dynamic_fp16_config as half
from quantizers.x86.range_policy import applied, ranged
from tests.quantizers.models import ROWS, annotated, annotations

AUTO = (
    "int8 kernels add two products in 16 bits on AVX2, where a full range would overflow: each layer "
    "uses the range that "
    "costs it least, noted per layer after calibration"
)

AVX2, VNNI = InstructionSet.of("avx2"), InstructionSet.of("avx512_vnni")


def numbers(made):
    return made.input_activation.quant_max, made.weight.quant_min, made.weight.quant_max


@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize(
    ("isa", "policy", "reduce_range", "kind", "expected"),
    [
        (VNNI, "auto", False, "full", (255, -128, 127)),
        (VNNI, "full", False, "full", (255, -128, 127)),
        (VNNI, "7-bit activations", False, "7-bit activations", (127, -128, 127)),
        (VNNI, "7-bit weights", False, "7-bit weights", (255, -64, 63)),
        (AVX2, "auto", False, "auto", (255, -128, 127)),
        (AVX2, "full", False, "full", (255, -128, 127)),
        (AVX2, "7-bit activations", False, "7-bit activations", (127, -128, 127)),
        (AVX2, "7-bit weights", False, "7-bit weights", (255, -64, 63)),
        # a configuration that is exact everywhere stays what it is
        *((isa, policy, True, policy, (127, -128, 127)) for isa in (VNNI, AVX2) for policy in ("full",
            "7-bit weights")),
    ],
)  # fmt: skip
def test_ranges(isa, policy, reduce_range, kind, expected, is_dynamic):
    given = config(is_dynamic=is_dynamic, reduce_range=reduce_range)
    assert applied(given, policy, isa) == kind
    assert numbers(ranged(given, policy, isa)) == expected
    assert numbers(given) == (127 if reduce_range else 255, -128, 127)


def test_observers_that_cannot_agree_get_seven_bits():
    activation = QuantizationSpec(torch.uint8, MinMaxObserver.with_args(), 0, 255, torch.per_tensor_affine)
    own = QuantizationConfig(activation, activation, config().weight, None)
    assert numbers(ranged(own, "auto", AVX2)) == (127, -128, 127)
    assert ranged(own, "auto", AVX2).output_activation.quant_max == 127
    assert ranged(own, "auto", VNNI) is own


@pytest.mark.parametrize(
    ("isa", "policy", "reduce_range", "note"),
    [
        ("avx512_vnni", "auto", False, "activations use 0..255: AVX512 VNNI multiplies full ranges exactly"),
        ("avx2", "auto", True,
            ("activations use 0..127, as configured: int8 kernels are exact with "
            "them on every machine")),
        ("avx2", "7-bit weights", False, "7-bit weights, as range_policy says, on AVX2"),
        ("avx2", "full", False,
            ("WARNING: activations use 0..255, and the int8 kernels saturate on AVX2: results may be wrong there; "
            "range_policy='auto' is exact")),
        ("avx2", "auto", False, AUTO),
    ],
)  # fmt: skip
def test_notes(isa, policy, reduce_range, note):
    quantizer = X86InductorQuantizer(isa=isa, range_policy=policy).set_global(config(reduce_range=reduce_range))
    annotated(nn.Linear(8, 4), ROWS, quantizer)
    assert quantizer.notes == [note]


def test_the_policy_is_what_is_annotated():
    quantizer = X86InductorQuantizer("amx", "7-bit weights").set_global(config())
    expected = "linear: input_1 u8[0,255], weight s8[-64,63] symmetric axis 0  [linear]"
    assert annotations(nn.Linear(8, 4), ROWS, quantizer) == expected


def test_float16_weights_have_no_range():
    quantizer = X86InductorQuantizer("avx2", "7-bit weights").set_global(half())
    assert annotations(nn.Linear(8, 4), ROWS, quantizer) == "linear: weight f16  [linear, float16 weight]"
    assert quantizer.notes == []


def test_mistakes():
    with pytest.raises(AnnotationError, match="range_policy='8-bit': choose one of 'auto', 'full', '7-bit act"):
        X86InductorQuantizer(range_policy="8-bit")
    with pytest.raises(AnnotationError, match="isa='avx3' is not known: choose one of amx, avx2"):
        X86InductorQuantizer(isa="avx3")
