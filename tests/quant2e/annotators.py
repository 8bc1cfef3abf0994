"""Small quantizers and specs that the tests of the core share: each says in a line what it annotates."""

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation, QuantizationSpec
from quant2e.observers.measuring import MinMaxObserver, PerChannelMinMaxObserver, PlaceholderObserver

aten = torch.ops.aten
ACT = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine)
WEIGHT = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, ch_axis=0)
WEIGHT_PER_TENSOR = QuantizationSpec(torch.int8, MinMaxObserver, -127, 127, torch.per_tensor_symmetric)
INT4 = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -8, 7, torch.per_channel_symmetric, ch_axis=0)
DYNAMIC = QuantizationSpec(torch.int8, PlaceholderObserver, -128, 127, torch.per_tensor_affine, is_dynamic=True)
HALF = QuantizationSpec(torch.float16, PlaceholderObserver)
WEIGHTED = (aten.linear.default, aten.conv2d.default, aten.conv1d.default, aten.conv_transpose2d.input)


class Annotate(Quantizer):
    """Calls ``annotate(node)`` on every op; what it returns is the node's annotation, None for none."""

    def __init__(self, annotate: Callable[[Node], QuantizationAnnotation | None]) -> None:
        self._annotate = annotate

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            note = self._annotate(node) if node.op == "call_function" else None
            if note is not None:
                node.meta[ANNOTATION] = note
        return model

    def validate(self, model: GraphModule) -> None:
        """Anything goes."""


NOTHING = Annotate(lambda node: None)


def products(act=ACT, weight=WEIGHT, output=ACT):
    """Linear and convolution: activation, weight, output; None leaves that operand out."""

    def note(node):
        if node.target not in WEIGHTED:
            return None
        specs = {node.args[0]: act, node.args[1]: weight}
        return QuantizationAnnotation({k: v for k, v in specs.items() if v is not None}, output, rule="product")

    return Annotate(note)


def on(target, inputs, output=None, **options):
    """One op: a spec for each tensor operand in order (None: stays float), and one for the output."""

    def note(node):
        if node.target is not target:
            return None
        operands = dict.fromkeys(node.all_input_nodes)
        return QuantizationAnnotation(dict(zip(operands, inputs, strict=False)), output, **options)

    return Annotate(note)
