"""What the tests of rounding share: quantizers, small models, and the check that conversion writes what was chosen."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule

import quant2e
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.observers.given import integers_given
from quant2e.report.record import record_of
from quantizers.composable import ComposableQuantizer
from quantizers.embedding import EmbeddingQuantizer
from quantizers.x86 import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

aten = torch.ops.aten


class _Weights(quant2e.Quantizer):
    """Annotates every parameter of two dimensions or more, at every op that reads it."""

    def __init__(self, observer, low: int, high: int) -> None:
        self._spec = quant2e.QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=observer,
            quant_min=low,
            quant_max=high,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            weights = [
                source
                for source in node.all_input_nodes
                if source.op == "get_attr" and getattr(source.meta.get("val"), "ndim", 0) > 1
            ]
            if weights:
                node.meta["quantization_annotation"] = quant2e.QuantizationAnnotation(
                    input_qspec_map=dict.fromkeys(weights, self._spec), _annotated=True
                )
        return model

    def validate(self, model: GraphModule) -> None:
        pass


def weights_only(observer, low: int = -8, high: int = 7):
    """A quantizer of weights alone."""
    return _Weights(observer, low, high)


def guest():
    """torchao's own x86 quantizer, with its observers."""
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as ao

    return ao.X86InductorQuantizer().set_global(ao.get_default_x86_inductor_quantization_config())


def xnnpack4():
    """8-bit activations, 4-bit weights per channel."""
    config = get_symmetric_quantization_config(is_per_channel=True, weight_qmin=-7, weight_qmax=7)
    return XNNPACKQuantizer().set_global(config)


def table_and_groups():
    """A table in 4 bits and linear layers in groups."""
    return ComposableQuantizer([EmbeddingQuantizer().set_global("w4-g32"), X86InductorQuantizer().set_global("w4-g32")])


QUANTIZERS = {
    "xnnpack": xnnpack4,
    "xnnpack, dynamic groups": lambda: XNNPACKQuantizer().set_global("w4a8-dynamic-g32"),
    "x86": lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
    "x86, groups": lambda: X86InductorQuantizer().set_global("w4-g32"),
    "x86, groups with zero points": lambda: X86InductorQuantizer().set_global("w4-g32-asym"),
    "table and groups": table_and_groups,
    "torchao's x86": guest,
}


class Small(nn.Module):
    """A table, a convolution of sequences, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(ids).unsqueeze(1)).mean(1)
        return self.second(torch.relu(self.first(x)))


def ids(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 20, (4, 6), generator=generator) for _ in range(count)]


def prepared(quantizer, model: nn.Module | None = None, data: list | None = None) -> GraphModule:
    """Calibrated on ``data``."""
    torch.manual_seed(0)
    data = ids(4) if data is None else data
    graph = quant2e.prepare_pt2e(quant2e.capture((Small() if model is None else model).eval(), (data[0],)), quantizer)
    return quant2e.calibrate(graph, data)


def check_conversion(before: GraphModule, after: GraphModule, x: torch.Tensor) -> GraphModule:
    """Conversion and simulation of ``after`` agree, its integers are those given, and its float result is as before."""
    assert torch.equal(after(x), before(x))
    converted = quant2e.convert_pt2e(after)
    simulated = SimulatedGraph(after)
    with simulated.rounding(list(simulated.points)):
        assert torch.equal(simulated(x), converted(x))
    stored = [b for n, b in converted.named_buffers() if n.endswith("_quantized")]
    for call in after.graph.nodes:
        if call.op == "call_module" and (wanted := integers_given(after, call)) is not None:
            encoding = record_of(converted).encodings[record_of(after).observers.index(str(call.target))]
            assert encoding.quant_min <= int(wanted.min()) <= int(wanted.max()) <= encoding.quant_max
            assert any(b.shape == wanted.shape and torch.equal(b, wanted) for b in stored)
    return converted
