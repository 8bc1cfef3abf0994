"""Weights rounded in place, to where quantization would put them: the second half of relax and round.

    w  <-  fake_quantize(w)                       where a batch norm is folded in, with factors s:  w  <-  fq(w · s) / s

Training in float and rounding from time to time is the way to integers that needs no straight-through gradient.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from quant2e.errors import AnnotationError, Quant2eError, where
from quant2e.graph.attributes import attribute
from quant2e.graph.captured.modes import is_training_graph
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.constants import Constants, evaluate
from quant2e.observers.base import is_observer_call
from quant2e.observers.derived import is_fake_quantizer
from quant2e.passes.train_batch_norm import FUSED, FusedNorm
from quant2e.pytorch_quantization.calibrators import HistogramCalibrator, MaxCalibrator, axes_of, kept_axes
from quant2e.pytorch_quantization.descriptor import QuantDescriptor
from quant2e.pytorch_quantization.tensor_quant import fake_tensor_quant
from quant2e.training.names import select_names


@torch.no_grad()
def quantize_weights_in_place(
    model: nn.Module, descriptors: Mapping[str | re.Pattern[str], QuantDescriptor] | None = None
) -> list[str]:
    """Round parameters of ``model``, in place, and say which: their names, as ``model.named_parameters()`` has them.

    With ``descriptors``, pattern (see `quant2e.training.select_names`) → descriptor: any module; each descriptor's amax
    is its own or, by its method, that of the parameter, along one or several axes. A later pattern rounds again what an
    earlier one named. Without: of a graph that `prepare_qat_pt2e` made, every weight that is fake-quantized, with the
    scale that its fake-quantizer has now; its statistics stay as they are.

    The model is changed because that is what is asked for; a prepared graph has tensors of its own. Raises
    `Quant2eError`, before anything is changed, for a pattern that names nothing, a graph without such weights, and a
    weight that is computed from several parameters; `CalibrationError` before any batch was seen; and as
    `fake_tensor_quant` and the calibrators do.
    """
    rounded = _by_descriptor(model, descriptors) if descriptors is not None else _by_fake_quantizer(model)
    parameters = dict(model.named_parameters())
    for name, value in rounded.items():
        parameters[name].copy_(value)
    return list(rounded)


def amax_of(x: Tensor, descriptor: QuantDescriptor) -> Tensor:
    """The magnitude that a descriptor gives a tensor: a scalar, or of its rank, 1 along all axes but its own.

    Float32, ``scale_amax`` included. Raises `AnnotationError` for an amax of another shape, and as calibrators do.
    """
    axis = axes_of(descriptor.axis)
    kept = kept_axes(x.shape, axis)
    if descriptor.amax is not None:
        amax = torch.tensor(descriptor.amax, dtype=torch.float32)
        shape = [size if each in kept else 1 for each, size in enumerate(x.shape)] if axis is not None else []
        if axis is not None and list(amax.shape) not in (shape, [x.shape[each] for each in kept]):
            raise AnnotationError(
                f"amax of shape {list(amax.shape)} with axis={axis}, and a tensor of shape {list(x.shape)}: give "
                f"{[x.shape[each] for each in kept]} numbers"
            )
        amax = amax.reshape(shape)
    else:
        arguments: dict[str, Any] = {"num_bits": descriptor.num_bits, "axis": axis, "unsigned": descriptor.unsigned}
        if descriptor.calib_method == "max":
            calibrator = MaxCalibrator(**arguments)
            calibrator.collect(x)
            amax = calibrator.compute_amax()
        else:
            histogram = HistogramCalibrator(
                **arguments,
                num_bins=descriptor.num_bins,
                skip_zeros=descriptor.skip_zeros,
                narrow_range=descriptor.narrow_range and not descriptor.unsigned,
            )
            histogram.collect(x)
            method = "entropy" if descriptor.calib_method == "histogram" else descriptor.calib_method
            amax = histogram.compute_amax(method, percentile=descriptor.percentile)
    return amax.to(x.device) * (1.0 if descriptor.scale_amax is None else descriptor.scale_amax)


def quantize_tensor(x: Tensor, descriptor: QuantDescriptor) -> Tensor:
    """``x`` fake-quantized as a descriptor says, with the straight-through gradient: same shape and dtype."""
    return fake_tensor_quant(
        x, amax_of(x, descriptor), descriptor.num_bits, descriptor.unsigned, descriptor.narrow_range
    )


def _by_descriptor(model: nn.Module, descriptors: Mapping[str | re.Pattern[str], QuantDescriptor]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for pattern, descriptor in descriptors.items():
        for name in select_names(parameters, pattern):
            found[name] = quantize_tensor(found.get(name, parameters[name]), descriptor)
    if not found:
        raise Quant2eError("no pattern is given, so no weight is quantized: descriptors={'*.weight': descriptor}")
    return found


def _by_fake_quantizer(model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(model, GraphModule):
        raise Quant2eError(
            f"a {type(model).__name__} has no fake-quantizers: give descriptors={{'*.weight': descriptor}}, or prepare "
            "the model for training"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if is_training_graph(model):  # where norms learn, what they fold into a weight is no constant
        model = copy_graph(model)
        model.eval()
    constants = Constants(model.graph)
    fused: tuple[FusedNorm, ...] = model.meta.get(FUSED, ())
    folded = {record.scaled: record.old_weight for record in fused}
    nodes = {node.name: node for node in model.graph.nodes}
    found: dict[str, Tensor] = {}
    for call in model.graph.nodes:
        quantizer = model.get_submodule(str(call.target)) if is_observer_call(call) else None
        if quantizer is None or not is_fake_quantizer(quantizer) or call.all_input_nodes[0] not in constants:
            continue
        read = call.all_input_nodes[0]
        source = nodes[folded[read.name]] if read.name in folded else read
        name = names.get(id(_parameter(model, source)))
        if name is None:
            raise Quant2eError(f"{where(call)}: its weight is computed from others, so none of them can be rounded")
        value, whole = evaluate(model, source).detach(), evaluate(model, read).detach()
        own: Any = copy.deepcopy(quantizer)
        own.eval()
        own.enable_fake_quant()
        own.disable_observer()
        rounded = own(whole)
        found[name] = rounded if read is source else torch.where(whole == 0, value, value * (rounded / whole))
    if not found:
        raise Quant2eError("no weight is fake-quantized here: prepare the model with a configuration for training")
    return found


def _parameter(model: GraphModule, node: Node) -> Any:
    return attribute(model, str(node.target)) if node.op == "get_attr" else None
