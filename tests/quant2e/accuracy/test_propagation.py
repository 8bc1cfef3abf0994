"""PT2E's numeric debugger: the same ops are compared, in every call, and what differs is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from quant2e.errors import Quant2eError
from quant2e.pt2e import (
    NodeSource,
    QuantizationComparisonResult,
    compare_results,
    extract_results_from_loggers,
    generate_numeric_debug_handle,
    prepare_for_propagation_comparison,
)
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    model[1].running_mean.normal_()
    return model.eval()


def batches(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def graphs() -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    captured = quant2e.capture(net(), (batches()[0],))
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    prepared = quant2e.calibrate(quant2e.prepare_pt2e(captured, quantizer), batches(6))
    return captured, quant2e.convert_pt2e(prepared)


def test_ops_are_compared_call_by_call():
    logged = [prepare_for_propagation_comparison(gm) for gm in graphs()]
    for x in batches():
        for gm, original in zip(logged, graphs(), strict=True):
            assert torch.equal(gm(x), original(x))
    found = compare_results(*map(extract_results_from_loggers, logged))
    summaries = {source.name: summary for source, summary in found.items()}
    assert summaries.keys() == {"batch_norm", "relu", "flatten", "linear"}  # the convolution has the norm in it
    for summary in summaries.values():
        assert len(summary.results) == 2
        assert all(float(result.sqnr) > 25.0 for result in summary.results)
    assert summaries["batch_norm"].actual_node_name == "conv2d"
    assert summaries["linear"].ref_module_stack == "4"


def test_the_measures():
    ref, actual = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    result = QuantizationComparisonResult(actual, ref)
    assert float(result.mse_loss) == 0.125
    assert float(result.sqnr) == pytest.approx(20.0)
    assert QuantizationComparisonResult((actual,), (ref,)).mse_loss == (torch.tensor(0.125),)
    with pytest.raises(Quant2eError, match="different shapes"):
        QuantizationComparisonResult(torch.zeros(2), torch.zeros(3))


def test_the_graph_is_left_as_it_is():
    captured, _ = graphs()
    code = captured.code
    prepare_for_propagation_comparison(captured)
    assert captured.code == code


def test_handles_are_unique_and_kept():
    program = torch.export.export(net(), (batches()[0],))
    generate_numeric_debug_handle(program)
    first = [node.meta["custom"]["numeric_debug_handle"] for node in program.graph.nodes if node.op == "call_function"]
    assert first == list(range(1, len(first) + 1))
    generate_numeric_debug_handle(program)
    again = [node.meta["custom"]["numeric_debug_handle"] for node in program.graph.nodes if node.op == "call_function"]
    assert again == first
    with pytest.raises(Quant2eError, match="takes an ExportedProgram"):
        generate_numeric_debug_handle(net())


def test_no_logger_no_result():
    captured, _ = graphs()
    assert extract_results_from_loggers(captured) == {}
    assert compare_results({NodeSource("a", 1): ()}, {}) == {}
