"""Export for a lowering: the graph and example it is given, and the graph exported again.

model ─▶ `plain_graph_of`, `example_of`, `dynamic_shapes_of` ─▶ `export` ─▶ an ExportedProgram
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from quant2e.errors import LoweringError, where
from quant2e.graph.captured.calls import Call, call_of
from quant2e.graph.captured.dynamic_shapes import read_dynamic_shapes
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.control_flow import graphs_of
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import FROM_NODE
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE
from quant2e.isolation import tracing
from quant2e.quantized_model import QuantizedModel
from quant2e.stored_tensor import read_stored, stored_in

Lowerable = QuantizedModel | torch.nn.Module
"""What can be lowered: what `quant2e.quantize` returned, a captured or converted GraphModule, or a module to export."""


def graph_of(model: Any) -> Any:
    """The graph of a QuantizedModel (its ``module``), or the module itself."""
    if isinstance(model, torch.nn.Module):
        return model
    module = getattr(model, "module", None)
    if isinstance(module, torch.nn.Module):
        return module
    raise LoweringError(
        f"cannot lower or compare a {type(model).__name__}: pass what quantize or convert_pt2e returned, "
        f"a captured GraphModule or an nn.Module"
    )


def plain_graph_of(model: Any) -> Any:
    """As `graph_of`, for what compilers look at: where tensors lie in files or in short forms, a copy that holds their
    values.
    """
    graph = graph_of(model)
    if not isinstance(graph, GraphModule) or not stored_in(graph):
        return graph
    copied = copy_graph(graph)
    read_stored(copied)
    return copied


def example_of(model: Any, given: Any) -> Call | None:
    """The example inputs that were given, or those that a QuantizedModel remembers; None where there are none."""
    if given is not None:
        return call_of(given)
    remembered = None if isinstance(model, torch.nn.Module) else getattr(model, "example_inputs", None)
    if remembered is None:
        return None
    args, kwargs = call_of(remembered)
    return Call(args, {**kwargs, **(getattr(model, "example_kwargs", None) or {})})


def needed_example_of(model: Any, given: Any, asker: str) -> Call:
    """The same for a function, ``asker``, that cannot do without. Raises `LoweringError` where there are none."""
    found = example_of(model, given)
    if found is None:
        raise LoweringError(f"{asker} needs example_inputs: a tuple of positional inputs, or a dict of keywords")
    return found


def dynamic_shapes_of(model: Any, given: Any) -> Any:
    """The dynamic shapes that were given, those that a QuantizedModel remembers, or those of its graph; else None."""
    if given is not None:
        return given
    if (remembered := getattr(model, "dynamic_shapes", None)) is not None:
        return remembered
    graph = graph_of(model)
    return read_dynamic_shapes(graph) if isinstance(graph, GraphModule) else None


def export(module: Any, example: Call, dynamic_shapes: Any) -> ExportedProgram:
    """``torch.export``, not strict. Raises `LoweringError` when it cannot trace the graph."""
    try:
        with tracing(), torch.no_grad():
            return torch.export.export(
                module, example.args, example.kwargs, dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:
        raise untraceable(error) from error


def refuse_written_inputs(exported: ExportedProgram, target: str) -> None:
    """Raise `LoweringError` for a program that writes to its inputs: ``target`` would return them as more outputs."""
    written = sorted(set(exported.graph_signature.user_inputs_to_mutate.values()))
    if written:
        raise LoweringError(
            f"the model writes to its input '{written[0]}', and a program of {target} cannot: let forward copy it "
            f"first, {written[0]} = {written[0]}.clone()"
        )


def untraceable(error: Exception) -> LoweringError:
    """The error for a graph that torch.export does not trace."""
    return LoweringError(f"torch.export cannot trace the graph with these example inputs and dynamic shapes: {error}")


def refuse_dtypes(
    graph: GraphModule, dtypes: Collection[torch.dtype], target: str, besides: Collection[Node] = ()
) -> None:
    """Raise `LoweringError` naming the tensors of ``dtypes`` that the graph quantizes, and ``target`` does not.

    ``besides``: quantize and dequantize nodes that the target has kernels for.
    """
    found = [
        f"{where(node)} is {str(dtype).removeprefix('torch.')}"
        for _, one in graphs_of(graph)
        for node in one.graph.nodes
        if node.target in QUANTIZE | DEQUANTIZE and node not in besides and (dtype := _float_dtype(node)) in dtypes
    ]
    if found:
        more = f" and {len(found) - 1} more" * (len(found) > 1)
        raise LoweringError(
            f"{target} does not run integers beside such floats: {found[0]}{more}. Quantize model.float() instead, on "
            f"float32 inputs"
        )


def _float_dtype(node: Node) -> torch.dtype | None:
    """Dtype of the floats that a node makes integers of, or makes of integers."""
    side = node_tensor(operand(node, 0) if node.target in QUANTIZE else node)
    return None if side is None else side.dtype


def drop_from_node(graph: Graph) -> None:
    """Drop each node's ``from_node``: the list of the nodes it was made from, one per pass so far.

    Every pass that follows copies the list of every node, which is most of what lowering a large model costs.
    """
    for node in graph.nodes:
        node.meta.pop(FROM_NODE, None)


def op_name(node: Node) -> str:
    """``aten.mul.Tensor`` for an op of any dialect."""
    if isinstance(node.target, OpOverload):
        return str(node.target)
    name = getattr(node.target, "__name__", str(node.target))
    return name.removeprefix("aten.") if name.startswith("aten.aten.") else name
