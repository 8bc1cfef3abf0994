"""Channel moves: factors of channels are put into the weights of a graph, which computes what it did.

    w  =>  w · s[rows] / s[columns]          b  =>  b · s[rows]          relu6(x)  =>  minimum(relu(x), 6·s)

Tensors that the graph shares with others are replaced, not written. Weights of 16 bits are scaled by powers of two,
which changes none of their digits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from quant2e.accuracy.algorithms.channels.rules import clamp_bounds
from quant2e.accuracy.algorithms.channels.scaling import ChannelScaling
from quant2e.accuracy.algorithms.channels.walk import Parameter
from quant2e.graph.attributes import free_path, replace_tensor, tensor_at
from quant2e.graph.dataflow import operand, set_operand
from quant2e.graph.edit import emit, emit_constant, emit_read, take_over

aten = torch.ops.aten

_SHORT = (torch.float16, torch.bfloat16)


def move(gm: GraphModule, scaling: ChannelScaling, factors: Tensor) -> None:
    """Put factors into ``gm``, a copy whose graph is the caller's own and that ``scaling`` was made of, in place.

    ``factors``: ``(scaling.count,)``, positive, the first one 1; any float dtype. Raises `ValueError` for others.
    """
    if factors.shape != (scaling.count,) or not bool((factors > 0).all()) or float(factors[0]) != 1.0:
        raise ValueError(f"factors are {scaling.count} positive numbers, the first one 1")
    factors = factors.double().cpu()
    if any(parameter.terms and parameter.value.dtype in _SHORT for parameter in scaling.parameters):
        factors = torch.exp2(torch.log2(factors).round())
    with torch.inference_mode(False), torch.no_grad():
        for parameter in scaling.parameters:
            _scale(gm, parameter, factors)
        for node, labels in scaling.clamps.items():
            if bool((factors[labels] != 1.0).any()):
                _clamp(gm, node, factors[labels])
    gm.graph.lint()
    gm.recompile()


def _scale(gm: GraphModule, parameter: Parameter, factors: Tensor) -> None:
    scale = torch.ones(1, dtype=torch.float64)
    for term in parameter.terms.values():
        scale = scale * (factors[term.labels] if term.sign > 0 else 1.0 / factors[term.labels])
    if bool((scale == 1.0).all()):
        return
    old = parameter.value
    value = (old.double() * scale.to(old.device)).to(old.dtype)
    sources = dict.fromkeys(operand(node, name) for node, name in parameter.places)
    tensors = [tensor for source in sources if (tensor := tensor_at(gm, source)) is not None]
    is_parameter = not tensors or isinstance(tensors[0], nn.Parameter)
    trained = any(tensor.requires_grad for tensor in tensors)
    new = nn.Parameter(value, requires_grad=trained) if is_parameter else value
    for source in sources:
        if isinstance(source, Node) and source.op == "get_attr":
            for path in _paths(gm, tensor_at(gm, source)):
                _put(gm, path, new)
            if "val" in source.meta and source.meta["val"].shape != value.shape:
                _read_again(gm, source)
            continue
        path = free_path(gm, _path(gm, parameter.places[0]))
        _put(gm, path, new)
        for node, name in parameter.places:
            if operand(node, name) is source:
                set_operand(node, name, emit_read(gm, node, path))
        if isinstance(source, Node):
            _erase(source)


def _paths(gm: GraphModule, tensor: Tensor | None) -> list[str]:
    """All names of a tensor: tied ones that the graph does not read stay tied."""
    named = (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    return [path for path, value in named if value is tensor]


def _put(gm: GraphModule, path: str, tensor: Tensor) -> None:
    """Put a parameter, or a buffer, at ``path``."""
    prefix, _, name = path.rpartition(".")
    owner = gm.get_submodule(prefix)
    if isinstance(tensor, nn.Parameter):
        replace_tensor(gm, path, tensor)
    elif name in owner._buffers:
        owner._buffers[name] = tensor
    else:
        setattr(owner, name, tensor)


def _read_again(gm: GraphModule, source: Node) -> None:
    """A read of an attribute whose shape has changed."""
    new = emit_read(gm, source, str(source.target), origin=source)
    source.replace_all_uses_with(new)
    source.graph.erase_node(source)


def _path(gm: GraphModule, place: tuple[Node, str]) -> str:
    """Where a new tensor of an op lies: beside one that it has, else at the root."""
    node, name = place
    beside = next((str(x.target) for x in node.all_input_nodes if tensor_at(gm, x) is not None), "")
    owner = beside.rpartition(".")[0]
    return f"{owner}.{name}" if owner else f"{node.name}_{name}"


def _erase(node: Node) -> None:
    """Erase a constant that nothing reads any more, and what only it read."""
    if node.users:
        return
    sources = list(node.all_input_nodes)
    node.graph.erase_node(node)
    for source in sources:
        _erase(source)


def _clamp(gm: GraphModule, node: Node, scale: Tensor) -> None:
    """A clamp with bounds for each channel; one from 0 on stays a relu, which backends compute with the op before."""
    bounds, x = clamp_bounds(node), operand(node, 0)
    assert bounds is not None, "only clamps with numbers take factors"
    value = node.meta["val"]
    low, high = (
        None if bound is None else (bound * scale).to(dtype=value.dtype, device=value.device) for bound in bounds
    )
    if bounds[0] == 0.0:
        x = emit(node, aten.relu.default, x)
        low = None
    for bound, target in ((low, aten.maximum.default), (high, aten.minimum.default)):
        if bound is not None:
            x = emit(node, target, x, emit_constant(gm, node, f"{node.name}_bound", bound))
    take_over(x, node)
    node.replace_all_uses_with(x)
    node.graph.erase_node(node)
