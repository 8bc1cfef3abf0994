"""Program writer: a graph of ops with its tensors as the records of an exported program, without tracing it again.

What ``torch.export.save`` writes of a program is written from the graph as it stands: it was exported once, its nodes
keep their names, and the value of each is known (``meta["val"]``), with the sizes that vary and their bounds.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from quant2e.errors import Quant2eError
from quant2e.graph.captured.inputs import Inputs, inputs_of
from quant2e.storage.writer.graph import write_graph
from quant2e.storage.writer.lifting import Kind, Lifted, lifted_tensors
from quant2e.storage.writer.origins import origin
from quant2e.storage.writer.tensors import tensor_records
from quant2e.storage.writer.values import Bytes, Json, Values
from quant2e.versions import SCHEMA, TORCH_VERSION

_DIALECT = "TRAINING"
"""What torch calls a program that was not decomposed, and may write into its buffers."""


def program_records(gm: GraphModule) -> Iterator[tuple[str, Bytes]]:
    """The records of ``gm``, in which every value is known, as an exported program, in the order of a file.

    Raises `Quant2eError`, with the place, for what a file cannot hold.
    """
    values, lifted = Values(), lifted_tensors(gm)
    yield "archive_format", b"pt2"
    yield "archive_version", b"0"
    yield ".data/version", b"6\n"
    yield "byteorder", b"little"
    for folder, prefix, are_weights in (("weights", "weight_", True), ("constants", "tensor_", False)):
        tensors = {item.path: item.tensor for item in lifted if item.is_weight is are_weights}
        records, table = tensor_records(tensors, prefix, values)
        yield from ((f"data/{folder}/{name}", make()) for name, make in records.items())
        yield f"data/{folder}/model_{folder}_config.json", as_json(table)
    yield "models/model.json", as_json(_program(gm, lifted, values))
    yield "data/sample_inputs/model.pt", b""


def as_json(data: Any) -> bytes:
    """JSON without spaces, in ASCII."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode("ascii")


def _program(gm: GraphModule, lifted: tuple[Lifted, ...], values: Values) -> Json:
    graph = write_graph(gm.graph, {item.source: item.name for item in lifted}, values, origin)
    inputs, outputs = graph["inputs"], graph["outputs"]
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    user_inputs = [_user_input(node.name, entry) for node, entry in zip(placeholders, inputs, strict=True)]
    call = {"inputs": [], "outputs": [], **_convention(gm)}  # torch names none here, and passes check those it finds
    graph["inputs"] = [{"as_tensor": {"name": item.name}} for item in lifted] + inputs
    graph["tensor_values"] |= {item.name: values.tensor(item.tensor) for item in lifted}
    signature = {
        "input_specs": [_lifted_input(item) for item in lifted] + user_inputs,
        "output_specs": [{"user_output": {"arg": entry}} for entry in outputs],
    }
    module = {"graph": graph, "signature": signature, "module_call_graph": [{"fqn": "", "signature": call}]}
    return {
        "graph_module": module,
        "opset_version": {"aten": torch._C._get_max_operator_version()},
        "range_constraints": _ranges(gm, values),
        "schema_version": {"major": SCHEMA[0], "minor": SCHEMA[1]},
        "verifiers": [_DIALECT],
        "torch_version": TORCH_VERSION,
        "guards_code": _guards(inputs_of(gm)),
    }


def _lifted_input(item: Lifted) -> Json:
    arg = {"name": item.name}
    if item.kind is Kind.PARAMETER:
        return {"parameter": {"arg": arg, "parameter_name": item.path}}
    if item.kind is Kind.BUFFER:
        return {"buffer": {"arg": arg, "buffer_name": item.path, "persistent": item.persistent}}
    return {"tensor_constant": {"arg": arg, "tensor_constant_name": item.path}}


def _user_input(name: str, entry: Json) -> Json:
    if "as_tensor" in entry or "as_sym_int" in entry:
        return {"user_input": {"arg": entry}}
    return {"constant_input": {"name": name, "value": entry}}


def _convention(gm: GraphModule) -> Json:
    """How inputs and outputs are nested, and what the arguments are called."""
    convention, codegen = inputs_of(gm), gm.graph._codegen
    in_spec = convention.spec or pytree.tree_structure((tuple(convention.names), {}))
    out_spec = codegen.pytree_info.out_spec if isinstance(codegen, _PyTreeCodeGen) else None
    if out_spec is None:
        output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
        out_spec = pytree.tree_structure(pytree.tree_map(lambda _: 0, output.args[0]))
    try:
        nested = {"in_spec": pytree.treespec_dumps(in_spec), "out_spec": pytree.treespec_dumps(out_spec)}
    except NotImplementedError as error:
        raise Quant2eError(
            f"the inputs or outputs are nested in a type without a name in files, {error}: return a tuple in its "
            "place, or register it with torch.utils._pytree, with a serialized_type_name"
        ) from error
    return {**nested, "forward_arg_names": list(convention.names)}


# ------------------------------------------------------------------------------------------------ bounds and conditions


def _ranges(gm: GraphModule, values: Values) -> Json:
    """Bounds of the sizes that vary: those that torch.export keeps with a graph, or that tracing found."""
    known = dict(getattr(gm, "range_constraints", None) or {})
    bounds = {symbol: known.get(symbol) or env.var_to_range[symbol] for symbol, env in values.symbols.items()}
    for size in _varying_sizes(gm):
        if size.node.expr not in bounds:
            bounds[size.node.expr] = known.get(size.node.expr) or size.node.shape_env.bound_sympy(size.node.expr)
    return {
        str(expression): {"min_val": _bound(found.lower), "max_val": _bound(found.upper)}
        for expression, found in sorted(bounds.items(), key=lambda item: str(item[0]))
    }


def _varying_sizes(gm: GraphModule) -> Iterator[SymInt]:
    for node in gm.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        yield from (size for size in sizes if isinstance(size, SymInt) and not size.node.expr.is_number)


def _bound(value: Any) -> int | None:
    return int(value) if value.is_Integer else None


def _guards(inputs: Inputs) -> list[str]:
    """Conditions on the inputs, as torch writes them: ``x.size()[0] % 8 == 0`` as ``L['x'].size()[0] % 8 == 0``."""
    return [_Locals(inputs.names).written(condition) for condition in inputs.conditions]


class _Locals(ast.NodeTransformer):
    """Puts an ``L[…]`` around the names of inputs."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def written(self, condition: str) -> str:
        return ast.unparse(self.visit(ast.parse(condition, mode="eval")))

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self._names:
            return node
        return ast.Subscript(ast.Name("L", ast.Load()), ast.Constant(node.id), ast.Load())
