"""A partitioner of another backend: OpenVINO's, which the wheel of ExecuTorch registers in its runtime.

Runs where ``openvino`` and ``nncf`` are installed, and ``libopenvino_c`` is found: on ``LD_LIBRARY_PATH``, or as a part
of the ``openvino`` package. Neither is a dependency of this project.
"""

import pytest
import torch
from torch import nn

import quant2e
from lowering import to_executorch
from quant2e.errors import LoweringError
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

pytest.importorskip("openvino")
pytest.importorskip("nncf")


def partitioner():
    from executorch.backends.openvino.partitioner import OpenvinoPartitioner
    from executorch.exir.backend.backend_details import CompileSpec

    return OpenvinoPartitioner([CompileSpec("device", b"CPU")])


@pytest.fixture
def net():
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


def test_a_float_model_is_one_delegate_and_verified(net):
    x = torch.randn(2, 3, 16, 16)
    program = to_executorch(quant2e.capture(net, (x,)), (x,), partitioners=[partitioner()])
    assert [part.backend for part in program.report.partitions] == ["OpenvinoBackend"]
    assert program.report.leftovers == ()
    assert program.report.verification.passed
    torch.testing.assert_close(program(x), net(x), atol=0.01, rtol=0.01)  # OpenVINO computes in bfloat16 where it can


def test_a_quantized_model_is_verified_or_refused_with_openvinos_reason(net):
    """OpenVINO 2026.4 cannot read a quantized graph of ExecuTorch 1.4, whoever made it; other releases may."""
    x = torch.randn(2, 3, 16, 16)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    quantized = quant2e.quantize(net, (x,), quantizer, [(x,)])
    reason = ""
    try:
        program = to_executorch(quantized, (x,), partitioners=[partitioner()])
    except LoweringError as error:
        reason = str(error)
    assert "OpConversionFailure" in reason if reason else program.report.verification.passed
