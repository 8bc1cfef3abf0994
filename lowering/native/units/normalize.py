"""Layer norms, root mean square norms and softmax over the channels of each row, as units of a region."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.native.kernels.plan import NOTHING, RegionStep, StepKind
from lowering.native.units.unit import Emitter, Unit, describe_operand, ending_of, finish
from lowering.native.units.values import image_of, image_shape, stored
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operands

aten = torch.ops.aten

_LAYER_NORM, _RMS_NORM = aten.layer_norm.default, aten.rms_norm.default
_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})


def normalize_unit(gm: GraphModule, node: Node, taken: set[Node]) -> Unit | str | None:
    """The unit of a norm or a softmax over the last axis of ``[n, rows, channels]`` or ``[n, channels]``."""
    if node.target not in (_LAYER_NORM, _RMS_NORM) and node.target not in _SOFTMAX:
        return None
    given, shape = operands(node), image_shape(node)
    x = given.get("input", given.get("self"))
    source = stored(x) or x
    if shape is None or len(shape) == 4 or not isinstance(x, Node) or not isinstance(source, Node):
        return "its operand has sizes that vary, or more than three axes"
    if image_of(source) is None:
        return "its operand has sizes that vary, or more than three axes"
    if node.target in _SOFTMAX:
        if given["dim"] % len(shape) != len(shape) - 1 or given.get("dtype") is not None:
            return "a softmax over another axis than the last"
        weight = bias = None
    elif list(given["normalized_shape"]) != [shape[-1]]:
        return "a norm over more than the last axis"
    else:
        weight, bias = tensor_at(gm, given["weight"]), tensor_at(gm, given.get("bias"))
        if any(given.get(name) is not None and tensor is None for name, tensor in (("weight", weight), ("bias", bias))):
            return "its weight or bias is computed"
    ending = ending_of(node, taken, adds=False, activates=False)
    epsilon = given.get("eps")
    if node.target is _RMS_NORM and epsilon is None:
        epsilon = torch.finfo(torch.float32).eps

    def emit(emitter: Emitter) -> None:
        step = RegionStep(
            kind=StepKind.SOFTMAX if node.target in _SOFTMAX else StepKind.LAYER_NORM,
            mode=int(node.target is _RMS_NORM),
        )
        describe_operand(step, emitter, "x", source)
        step.extra_number = float(epsilon or 0.0)
        step.scale, step.bias = _constant(emitter, weight), _constant(emitter, bias)
        finish(emitter, step, ending=ending)

    dequantizes = (x,) if source is not x else ()
    return Unit(nodes=(*dequantizes, node, *ending.nodes), reads=(source,), writes=ending.writes, emit=emit)


def _constant(emitter: Emitter, tensor: Tensor | None) -> int:
    return NOTHING if tensor is None else emitter.constants.add(tensor.detach().to(torch.float32))
