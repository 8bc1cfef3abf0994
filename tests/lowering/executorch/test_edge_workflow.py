"""ExecuTorch's other workflow, ``to_edge`` and then ``to_backend``: it collects the nodes of a linear by their origin.

It is deprecated there and still used. What is converted here has to come out right without `lowering`. A linear that is
a call of ``F.linear`` is taken in graphs that torch.export made with ``strict=True``: others have no name for it.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.fx.passes.utils.source_matcher_utils import get_source_partitions

from quant2e import calibrate, convert_pt2e, prepare_pt2e
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

pytest.importorskip("executorch")


class Layers(nn.Module):
    """A linear as a layer, one as a function, and a relu behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 6)
        self.weight = nn.Parameter(torch.randn(5, 6) * 0.3)

    def forward(self, x):
        return torch.nn.functional.linear(self.layer(x).relu(), self.weight)


MODELS = {
    "layers": (Layers, torch.randn(2, 3, 8)),
    "a layer that is the model": (lambda: nn.Linear(8, 6), torch.randn(4, 8)),
    "a convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8)),
}
CONFIGS = {
    "per tensor": get_symmetric_quantization_config(),
    "per channel": get_symmetric_quantization_config(is_per_channel=True),
    "dynamic": get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True),
}


CASES = [
    ("per channel", "layers", True),
    ("per tensor", "a layer that is the model", False),
    ("per channel", "a convolution", False),
    pytest.param("per tensor", "layers", True, marks=pytest.mark.slow),
    pytest.param("dynamic", "layers", True, marks=pytest.mark.slow),
    pytest.param("dynamic", "a layer that is the model", True, marks=pytest.mark.slow),
    pytest.param("dynamic", "a convolution", True, marks=pytest.mark.slow),
]


def converted(model, x, config, *, strict):
    torch.manual_seed(0)
    graph = torch.export.export(model().eval(), (x,), strict=strict).module()
    prepared = prepare_pt2e(graph, XNNPACKQuantizer().set_global(config))
    return convert_pt2e(calibrate(prepared, [(x,)]))


@pytest.mark.parametrize(("config", "model", "strict"), CASES)
def test_partitions_are_whole(model, config, strict):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_xnnpack_edge_compile_config
    from executorch.exir import to_edge

    from lowering.executorch.runtime import load_method, load_program

    make, x = MODELS[model]
    graph = converted(make, x, CONFIGS[config], strict=strict)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(graph, (x,))
        edge = to_edge(exported, compile_config=get_xnnpack_edge_compile_config())
        delegated = edge.to_backend(XnnpackPartitioner())
        program = load_program(bytes(delegated.to_executorch().buffer))
        (found,) = load_method(program, "forward").execute([x])
        expected = graph(x)
    names = [node.name for node in delegated.exported_program().graph.nodes]
    assert [name for name in names if "addmm" in name or "_mm_" in name or "convolution" in name] == []
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_quantize_and_dequantize_are_no_part_of_a_layer(strict):
    make, x = MODELS["layers"]
    graph = converted(make, x, CONFIGS["per channel"], strict=strict)
    wanted = [nn.Linear, torch.nn.functional.linear, "linear"]
    partitions = [p for found in get_source_partitions(graph.graph, wanted).values() for p in found]
    nodes = {str(node.target) for partition in partitions for node in partition.nodes if node.op == "call_function"}
    assert nodes == {"aten.linear.default"}
    around = [node for node in graph.graph.nodes if "quantize_per" in str(node.target)]
    assert {path for node in around for path, _ in node.meta["nn_module_stack"].values()} >= {"layer"}
