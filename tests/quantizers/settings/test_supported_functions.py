"""What our quantizers answer to PT2E's ``get_supported_operators`` and its kin: what their rules match."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant2e.annotation.config import QuantizationConfig
from quant2e.annotation.specs import ANNOTATION
from quant2e.errors import AnnotationError
from quant2e.graph.captured.capture import capture
from quantizers import EmbeddingQuantizer, X86InductorQuantizer, XNNPACKQuantizer, get_symmetric_quantization_config
from quantizers.settings.supported_functions import supported_functions

OURS = (XNNPACKQuantizer, X86InductorQuantizer, EmbeddingQuantizer)
DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)


@pytest.mark.parametrize("quantizer", OURS)
def test_the_three_methods_agree(quantizer):
    told = quantizer.get_supported_operators()
    assert [config for config, _ in told] == quantizer.get_supported_quantization_configs()
    for config, operators in told:
        assert operators == quantizer.get_supported_operator_for_quantization_config(config)
        assert operators == supported_functions(quantizer().table(config))
    every = quantizer.get_supported_operator_for_quantization_config(None)
    assert all(pattern in every for _, operators in told for pattern in operators)


def test_xnnpack_lists_what_executorch_lists():
    found = XNNPACKQuantizer.get_supported_operator_for_quantization_config(get_symmetric_quantization_config())
    for pattern in ([F.conv2d, F.relu], [F.linear], [torch.add], [F.adaptive_avg_pool2d], [torch.add, F.relu]):
        assert pattern in found
    found = XNNPACKQuantizer.get_supported_operator_for_quantization_config(DYNAMIC)
    assert found == [[F.linear], [F.conv2d], [torch.convolution], [F.conv_transpose2d]]
    assert EmbeddingQuantizer.get_supported_operators()[0].operators == [[F.embedding], [F.embedding_bag]]


@pytest.mark.slow
def test_executorch_quantizes_at_run_time_what_xnnpack_lists_so():
    pytest.importorskip("executorch")
    script = (
        "from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer\n"
        "print(*(pattern.name for pattern in XNNPACKQuantizer.SUPPORTED_PATTERNS if pattern.is_dynamic))"
    )
    told = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert told.split() == ["linear", "conv", "conv_transpose"]


def test_a_chain_reads_from_the_inside_out():
    found = X86InductorQuantizer.get_supported_operator_for_quantization_config(None)
    assert [F.conv2d, torch.add, F.relu] in found
    assert [F.linear, F.gelu] in found


def test_a_configuration_that_cannot_run_is_refused():
    weights_alone = QuantizationConfig(None, None, DYNAMIC.weight, None, False)
    with pytest.raises(AnnotationError, match="XNNPACK"):
        XNNPACKQuantizer.get_supported_operator_for_quantization_config(weights_alone)


@pytest.mark.parametrize("function", [F.relu, F.hardswish, F.gelu, F.tanh])
def test_what_is_listed_behind_linear_is_one_pattern_there(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return function(self.linear(x))

    config = X86InductorQuantizer.get_supported_quantization_configs()[0]
    graph = X86InductorQuantizer().set_global(config).annotate(capture(Net().eval(), (torch.randn(2, 8),)))
    last = list(graph.graph.nodes)[-2]
    listed = [F.linear, function] in X86InductorQuantizer.get_supported_operator_for_quantization_config(config)
    assert (ANNOTATION in last.meta) == listed
