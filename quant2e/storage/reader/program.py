"""StoredProgram reader: records become a captured graph with its parameters, buffers and constants.

The module that comes out is the one that ``torch.export.load(file).module()`` would give, taken over as
`quant2e.graph.captured.capture.as_graph_module` takes it; nothing of torch's own reader has a part in it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.export import Dim
from torch.fx import Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from quant2e.documents.json_text import read_json
from quant2e.errors import FileFormatError, Quant2eError
from quant2e.graph.captured.capture import DIALECTS, complete
from quant2e.graph.captured.module import CapturedModule, uncompiled
from quant2e.storage.reader.convention import ALWAYS, CallConvention, read_convention, stored_inputs
from quant2e.storage.reader.graph import GraphReader, matches, name_in, taken
from quant2e.storage.reader.ops import Ops
from quant2e.storage.reader.origins import Origins
from quant2e.storage.reader.schema import PROGRAM, check_schema
from quant2e.storage.reader.shapes import Shapes
from quant2e.versions import SCHEMA

_LIFTED = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
_MUTATED = {
    "buffer_mutation": "buffer_name", "parameter_mutation": "parameter_name", "user_input_mutation": "user_input_name",
}  # fmt: skip
_MODULES_PER_TENSOR = 16
"""Modules that a file may describe for each of its tensors: a chain of empty ones would cost much and hold nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredProgram:
    """A program of a file. ``placeholders``: its inputs, flattened; ``ranges``: bounds of sizes, by their formulas."""

    module: CapturedModule
    convention: CallConvention
    placeholders: tuple[Node, ...]
    ranges: Mapping[str, tuple[int | None, int | None]]

    @property
    def dynamic_shapes(self) -> Any:
        """Which sizes of the inputs vary, and within which bounds, as ``torch.export`` takes it; None: none does."""
        leaves = [self._dynamic_sizes(node.meta.get("val")) for node in self.placeholders]
        if not any(leaves):
            return None
        args, kwargs = pytree.tree_unflatten(leaves, self.convention.inputs)
        return (*args, *kwargs.values())

    def _dynamic_sizes(self, value: Any) -> Any:
        if isinstance(value, SymInt):
            return self._bounded(value.node.expr)
        if not isinstance(value, Tensor):
            return None
        sizes: tuple[Any, ...] = tuple(value.shape)
        return {i: self._bounded(size.node.expr) for i, size in enumerate(sizes) if type(size) is not int} or None

    def _bounded(self, formula: Any) -> Any:
        low, high = self.ranges.get(str(formula), (None, None))
        bounds = {"min": low if low is not None and low > ALWAYS else None, "max": high}
        given = {name: bound for name, bound in bounds.items() if bound is not None}
        return Dim.AUTO(**given) if given else Dim.AUTO


def stored_program(text: memoryview, weights: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> StoredProgram:
    """The program that a JSON text describes, with tensors by their paths. Raises `FileFormatError`."""
    data = read_json(text, "its program")
    check_schema(data, PROGRAM, "its program")
    _check_versions(data)
    ranges = {
        text: (bounds.get("min_val"), bounds.get("max_val")) for text, bounds in data["range_constraints"].items()
    }
    module = data["graph_module"]
    try:
        return _ProgramReader(module, weights, constants, ranges).read(
            data.get("guards_code", []), data["verifiers"][0]
        )
    except Quant2eError as error:
        raise FileFormatError(str(error)) from error
    except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AssertionError) as error:
        # what torch has to say about a graph, a size or a name that only its own checks find
        raise FileFormatError(f"its graph is not one: {type(error).__name__}: {error}") from error


def _check_versions(data: Mapping[str, Any]) -> None:
    minor, opset = data["schema_version"]["minor"], data["opset_version"].get("aten")
    newest = torch._C._get_max_operator_version()
    if not 0 <= minor <= SCHEMA[1] or opset is None or not 0 < opset <= newest:
        raise FileFormatError(
            f"it was written by another version of torch ({data.get('torch_version', 'unknown')[:40]}), in schema "
            f"8.{minor} with opset {opset}; this version reads up to 8.{SCHEMA[1]} and {newest}"
        )
    dialects = data.get("verifiers", [])
    if len(dialects) != 1 or dialects[0] not in DIALECTS:
        raise FileFormatError(
            f"it is in the dialect {', '.join(dialects)[:80]}: what a backend made of a program is not read, only "
            "what torch.export and quant2e write"
        )


class _ProgramReader:
    def __init__(
        self,
        data: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        ranges: Mapping[str, tuple[int | None, int | None]],
    ) -> None:
        self._data, self._graph, self._ranges = data, data["graph"], ranges
        self._weights, self._constants = dict(weights), dict(constants)
        self._root = uncompiled()
        self._shapes = Shapes(ranges)
        self._reader = GraphReader(self._root, self._shapes, Ops(), Origins())
        self._modules_left = 64 + _MODULES_PER_TENSOR * (len(weights) + len(constants))
        self._lifted: dict[str, Node] = {}

    def read(self, guards: Sequence[str], dialect: str) -> StoredProgram:
        """The whole program."""
        convention = read_convention(self._data["module_call_graph"])
        self._reader.describe(self._graph)
        placeholders = self._read_inputs()
        for node in taken(self._graph["nodes"]):
            self._reader.node(node)
        returned = self._read_outputs(placeholders)
        if convention.outputs.num_leaves != returned:
            raise FileFormatError(
                f"its outputs are nested as {convention.outputs.num_leaves}, and it returns {returned}"
            )
        self._finish(convention, placeholders, guards, dialect)
        nodes = tuple(node for node in self._root.graph.nodes if node.op == "placeholder")
        return StoredProgram(self._root, convention, nodes, self._ranges)

    def _read_inputs(self) -> list[Node]:
        """Parameters, buffers and constants become attributes of the module; the other inputs are returned."""
        specs, inputs = self._data["signature"]["input_specs"], self._graph["inputs"]
        if len(specs) != len(inputs):
            raise FileFormatError("its signature has another number of inputs than its graph")
        users = []
        for index, (spec, argument) in enumerate(zip(specs, inputs, strict=True)):
            ((kind, held),) = spec.items()
            if kind == "user_input" and held["arg"] == argument:
                users.append(self._reader.placeholder(argument, f"arg{index}"))
            elif kind == "constant_input" and held["value"] == argument:
                users.append(self._reader.placeholder(argument, held["name"]))
            elif kind in _LIFTED and {"as_tensor": held["arg"]} == argument:
                self._lift(kind, held)
            else:
                raise FileFormatError(f"input {index} of its signature is not that of its graph")
        if left := [*self._weights, *self._constants]:
            raise FileFormatError(f"its graph does not have the tensor '{left[0]}'")
        return users

    def _lift(self, kind: str, spec: Mapping[str, Any]) -> None:
        path, name = spec[_LIFTED[kind]], spec["arg"]["name"]
        kept = kind == "parameter" or spec.get("persistent")
        tensor = (self._weights if kept else self._constants).pop(path, None)
        value = self._reader.value(name)
        if tensor is None or isinstance(tensor, nn.Parameter) is not (kind == "parameter"):
            raise FileFormatError(f"it does not hold the {kind.replace('_', ' ')} '{path}'")
        if not matches(value, tensor):
            raise FileFormatError(f"the tensor '{path}' has another dtype or other sizes than its graph says")
        owner, leaf = self._place(path)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        elif kind == "buffer":
            owner.register_buffer(leaf, tensor, persistent=bool(spec["persistent"]))
        else:
            vars(owner)[leaf] = tensor
        node = self._reader.graph.create_node("get_attr", path)
        node.meta["val"] = value
        self._reader.alias(name, node)
        self._lifted[path] = node

    def _place(self, path: str) -> tuple[nn.Module, str]:
        """The module that a tensor belongs to, made where it is missing."""
        prefix, _, leaf = path.rpartition(".")
        owner: nn.Module = self._root
        for part in prefix.split(".") if prefix else ():
            if part not in owner._modules:
                self._modules_left -= 1
                if hasattr(owner, part) or self._modules_left < 0:
                    raise FileFormatError(f"'{path}' cannot be the path of a tensor")
                owner.add_module(part, nn.Module())
            child = owner._modules[part]
            assert child is not None
            owner = child
        if hasattr(owner, leaf):
            raise FileFormatError(f"'{path}' cannot be the path of a tensor: there is such an attribute already")
        return owner, leaf

    def _read_outputs(self, placeholders: Sequence[Node]) -> int:
        """The end of the graph, with a copy for each value that was written back; how many results there are."""
        specs, outputs = self._data["signature"]["output_specs"], self._graph["outputs"]
        if len(specs) != len(outputs) or self._graph.get("is_single_tensor_return"):
            raise FileFormatError("its signature has another number of outputs than its graph")
        values, copies = [], {}
        inputs = {node.name: node for node in placeholders}
        for index, (spec, argument) in enumerate(zip(specs, outputs, strict=True)):
            ((kind, held),) = spec.items()
            value = self._reader.returned(argument)
            if kind == "user_output" and held["arg"] == argument:
                values.append(value)
                continue
            place = held[_MUTATED[kind]] if kind in _MUTATED else ""
            written = (inputs if kind == "user_input_mutation" else self._lifted).get(place)
            if written is None or name_in(argument) != held["arg"]["name"]:
                raise FileFormatError(f"output {index} of its signature is not that of its graph")
            copy = self._reader.graph.create_node("call_function", torch.ops.aten.copy_.default, (written, value))
            copy.meta["val"] = written.meta["val"]
            copies[value] = copy
        self._reader.output(
            [copies.get(value, value) if isinstance(value, Node) else value for value in values], single=False
        )
        return len(values)

    def _finish(
        self, convention: CallConvention, placeholders: Sequence[Node], guards: Sequence[str], dialect: str
    ) -> None:
        """Calling convention, mode and code of the module."""
        root = self._root
        info = _PyTreeInfo(list(convention.names), convention.inputs, convention.outputs)
        root.graph._codegen = _PyTreeCodeGen(info)
        inputs = stored_inputs(convention, placeholders, self._ranges, guards)
        if custom := self._data.get("metadata", {}).get("custom"):
            root.meta["custom"] = read_json(custom, "the custom metadata of its graph")
        if dialect == "ATEN":
            _drop_unread_results(root)
        complete(root, inputs)
        root.graph.lint()
        for module in root.modules():
            if isinstance(module, CapturedModule):
                module.recompile()


def _drop_unread_results(gm: CapturedModule) -> None:
    """In a program of core ops, results that nothing reads have no node: batch norm returns five, and one is read."""
    for node in reversed(gm.graph.nodes):
        if node.target is operator.getitem and not node.users:
            gm.graph.erase_node(node)
