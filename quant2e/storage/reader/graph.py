"""Graph reader: the checked JSON of a graph becomes an FX graph, node by node.

Names are looked up among the nodes of the same graph, ops in a table, bodies of control flow become modules of the
owner. A node has the name the file gives it; a value that several results come out of has a ``getitem`` for each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node

from quant2e.errors import FileFormatError
from quant2e.graph.captured.module import CapturedModule, take_graph, uncompiled
from quant2e.storage.reader.ops import Ops
from quant2e.storage.reader.origins import Origins
from quant2e.storage.reader.schema import is_identifier
from quant2e.storage.reader.schema_numbers import MEMORY_FORMATS
from quant2e.storage.reader.shapes import Shapes
from quant2e.storage.reader.tensors import DTYPES, device_of

_POSITIONAL, _KEYWORD = 1, 2
_NAMED = ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool")
_LISTS = ("as_tensors", "as_sym_ints", "as_sym_floats", "as_sym_bools")
_CONSTANTS = ("as_int", "as_bool", "as_string")
_FORMATS = {number: form for form, number in MEMORY_FORMATS.items()}
_WITHOUT_NODES: Mapping[str, Callable[[Any], Any]] = {
    "as_none": lambda _: None,
    "as_float": float,
    "as_floats": lambda value: [float(item) for item in value],
    "as_scalar_type": DTYPES.__getitem__,
    "as_memory_format": lambda value: _FORMATS[value],
    "as_layout": lambda _: torch.strided,
    "as_device": device_of,
    "as_complex": lambda value: complex(float(value["real"]), float(value["imag"])),
    "as_int_lists": lambda value: [tuple(inner) for inner in value],
    "as_float_lists": lambda value: [[float(item) for item in inner] for inner in value],
}
"""Operands that are neither nodes nor as they stand in the file."""

_DEEPEST = 20


def name_in(argument: Mapping[str, Any]) -> str | None:
    """The name of the value that an argument stands for; None for a constant or a list."""
    ((kind, value),) = argument.items()
    if kind not in _NAMED:
        return None
    name: str | None = value.get("name") or value.get("as_name")
    return name


class GraphReader:
    """Reads one graph into ``owner``; ``depth``: how many control flow ops it is inside of."""

    def __init__(self, owner: CapturedModule, shapes: Shapes, ops: Ops, origins: Origins, depth: int = 0) -> None:
        if depth > _DEEPEST:
            raise FileFormatError(f"its control flow is nested more than {_DEEPEST} levels deep")
        self.owner, self.graph = owner, Graph()
        self._shapes, self._ops, self._origins, self._depth = shapes, ops, origins, depth
        self._nodes: dict[str, Node] = {}
        self._values: dict[str, tuple[Any, Any]] = {}
        self._legal: dict[str, str] = {}

    def describe(self, data: dict[str, Any]) -> None:
        """Take in what the file says about the values of the graph, and keep their names from being given to others.

        The descriptions are taken out of ``data``: each is freed once its node is made.
        """
        kinds = {
            "tensor_values": self._shapes.tensor,
            "sym_int_values": self._shapes.integer,
            "sym_float_values": self._shapes.real,
            "sym_bool_values": self._shapes.boolean,
        }
        for kind, read in kinds.items():
            for name, described in data.pop(kind, {}).items():
                if name in self._values:
                    raise FileFormatError(f"the value '{name}' is described twice")
                self._values[name] = (read, described)
        named = (node["name"] for node in data["nodes"] if node.get("name"))
        for name in dict.fromkeys((*self._values, *named)):
            self._legal[name] = self.graph._graph_namespace.create_name(name, None)

    def value(self, name: str) -> Any:
        """What a value is, without its data. Each name is the name of one node."""
        found = self._values.pop(name, None)
        if found is None:
            raise FileFormatError(f"the value '{name}' is not described, or has two nodes")
        read, described = found
        return read(described)

    def bind(self, node: Node, name: str) -> Node:
        """Let a node be the value of that name."""
        self._rename(node, name)
        node.meta["val"] = self.value(name)
        return node

    def placeholder(self, argument: Mapping[str, Any], constant_name: str) -> Node:
        """An input: a tensor or size that has a name, or a constant, which gets one."""
        if (name := name_in(argument)) is not None:
            return self.bind(self.graph.create_node("placeholder", name, name=name), name)
        ((kind, value),) = argument.items()
        if kind not in ("as_none", "as_float", *_CONSTANTS):
            raise FileFormatError(f"an input cannot be given as {kind}")
        node = self.graph.create_node("placeholder", constant_name, name=constant_name)
        self._rename(node, constant_name)
        node.meta["val"] = self.argument({kind: value})
        return node

    def alias(self, name: str, node: Node) -> None:
        """Let operands called ``name`` be that node, which is called otherwise."""
        if name in self._nodes:
            raise FileFormatError(f"two nodes are called '{name}'")
        self._nodes[name] = node

    def node(self, data: Mapping[str, Any]) -> None:
        """One node, and the ``getitem`` nodes of its results."""
        target = self._ops.find(data["target"])
        origin = self._origins.read(data["metadata"])
        if isinstance(target, OpOverload):
            args, kwargs = self._by_schema(target, data["inputs"])
        else:
            args, kwargs = self._as_spelled(data["inputs"], isinstance(target, HigherOrderOperator))
            for body in args:
                if isinstance(body, Node) and body.op == "get_attr" and body.target in self.owner._modules:
                    body.meta.update(origin)
        own = data.get("name") or (name_in(data["outputs"][0]) if len(data["outputs"]) == 1 else None)
        node = self.graph.create_node("call_function", target, args, kwargs, own)
        self._results(node, data, origin)
        node.meta.update({"nn_module_stack": {}, **origin})

    def output(self, values: Sequence[Any], *, single: bool) -> None:
        """The end of the graph: what it returns."""
        if single and (len(values) != 1 or not isinstance(values[0], Node)):
            raise FileFormatError("a graph returns something else than the one tensor it should")
        node = self.graph.output(values[0] if single else tuple(values))
        found = tuple(value.meta.get("val") if isinstance(value, Node) else value for value in values)
        node.meta["val"] = found[0] if single else found
        if self._values:
            raise FileFormatError(f"no node of its graph is the value '{next(iter(self._values))}'")
        for each in self.graph.nodes:
            if bindings := self._shapes.unbacked_bindings(each.meta.get("val")):
                each.meta["unbacked_bindings"] = bindings
        take_graph(self.owner, self.graph)

    def returned(self, argument: Mapping[str, Any]) -> Any:
        """A result of the graph: a node, or a constant."""
        ((kind, _),) = argument.items()
        if kind not in (*_NAMED, *_CONSTANTS, "as_none", "as_float"):
            raise FileFormatError(f"a graph cannot return {kind}")
        return self.argument(argument)

    def argument(self, argument: Mapping[str, Any]) -> Any:
        """An operand: nodes, numbers, text, dtypes and the like, or a list of those."""
        ((kind, value),) = argument.items()
        if kind == "as_tensor":
            return self._node(value["name"])
        if kind in _CONSTANTS:
            return value
        if kind in ("as_ints", "as_bools", "as_strings"):
            return list(value)
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
            return [self._size(item) for item in value]
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            return self._size(value)
        if kind in _WITHOUT_NODES:
            return _WITHOUT_NODES[kind](value)
        return self._nested(kind, value)

    def _nested(self, kind: str, value: Any) -> Any:
        """Lists of nodes, and the bodies of control flow."""
        match kind:
            case "as_tensors":
                return [self._node(item["name"]) for item in value]
            case "as_optional_tensors":
                return [None if "as_none" in item else self._node(item["as_tensor"]["name"]) for item in value]
            case "as_nested_tensors":
                return [[self._node(item["name"]) for item in inner] for inner in value]
            case "as_graph":
                return self._body(value["name"], value["graph"])
        raise FileFormatError(f"an operand cannot be given as {kind}")

    def _size(self, value: Mapping[str, Any]) -> Any:
        ((kind, held),) = value.items()
        return self._node(held) if kind == "as_name" else float(held) if kind == "as_float" else held

    def _node(self, name: str) -> Node:
        found = self._nodes.get(name)
        if found is None:
            raise FileFormatError(f"a node reads '{name}', which nothing in front of it computes")
        return found

    def _body(self, name: str, data: dict[str, Any]) -> Node:
        """A branch or loop body: a graph of its own, in a module of the owner."""
        if hasattr(self.owner, name):
            raise FileFormatError(f"'{name}' cannot be the name of a branch: the module has such an attribute already")
        body = uncompiled()
        reader = GraphReader(body, self._shapes, self._ops, self._origins, self._depth + 1)
        read_graph(reader, data)
        self.owner.add_module(name, body)
        return self.graph.create_node("get_attr", name, name=name)

    def _by_schema(self, target: OpOverload, inputs: Sequence[Mapping[str, Any]]) -> tuple[Any, dict[str, Any]]:
        """Operands of an op, in the order of its schema."""
        given = {entry["name"]: entry for entry in inputs}
        declared = target._schema.arguments
        known = {argument.name: argument for argument in declared}
        if len(given) != len(inputs) or not given.keys() <= known.keys():
            raise FileFormatError(f"{target} is called with operands that it does not have")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for place, argument in enumerate(declared):
            entry = given.get(argument.name)
            if entry is None:
                if not argument.has_default_value():
                    raise FileFormatError(f"{target} is called without its operand '{argument.name}'")
                continue
            kind = entry.get("kind") or (
                _KEYWORD if argument.has_default_value() or argument.kwarg_only else _POSITIONAL
            )
            value = self.argument(entry["arg"])
            if kind == _KEYWORD and is_identifier(argument.name):
                kwargs[argument.name] = value
            elif len(args) != place or argument.kwarg_only:
                raise FileFormatError(f"{target} is called with operands in an order that it does not have")
            else:
                args.append(value)
        return tuple(args), kwargs

    def _as_spelled(self, inputs: Iterable[Mapping[str, Any]], keywords: bool) -> tuple[Any, dict[str, Any]]:
        """Operands of something without a schema."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for entry in inputs:
            name, value = entry["name"] or "", self.argument(entry["arg"])
            if entry.get("kind") != _KEYWORD or not keywords or name == "":
                args.append(value)
            elif is_identifier(name) and name not in kwargs:
                kwargs[name] = value
            else:
                raise FileFormatError(f"{name[:80]!r} is no name of an operand")
        return tuple(args), kwargs

    def _results(self, node: Node, data: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
        outputs = data["outputs"]
        if not outputs:
            self._rename(node, data.get("name") or node.name)
            return
        body = isinstance(node.target, HigherOrderOperator)
        if len(outputs) == 1:
            ((kind, value),) = outputs[0].items()
            if kind == "as_none":
                node.meta["val"] = None
                node._rename(f"{self.graph._target_to_str(node.target)}_unused")
                return
            if kind in _NAMED and not (body and not data.get("is_hop_single_tensor_return")):
                name = name_in(outputs[0])
                if name is None:
                    raise FileFormatError(f"a result of '{node.name}' has no name")
                self.bind(node, name)
                return
            if kind in _LISTS:
                outputs = [{kind.removesuffix("s"): item} for item in value]
        self._rename(node, data.get("name") or node.name)
        node.meta["val"] = tuple(self._items(node, outputs, origin))

    def _items(self, node: Node, outputs: Sequence[Mapping[str, Any]], origin: Mapping[str, Any]) -> list[Any]:
        """A ``getitem`` node for each of several results; what they are."""
        found: list[Any] = []
        for index, output in enumerate(outputs):
            ((kind, value),) = output.items()
            name = name_in(output) or ("as_none" if kind == "as_none" else None)
            item = self.graph.create_node("call_function", operator.getitem, (node, index), name=name)
            if kind in _LISTS:
                inner = [{kind.removesuffix("s"): each} for each in value]
                item.meta["val"] = self._items(item, inner, origin)
            elif kind == "as_none":
                item.meta["val"] = None
            elif kind in _NAMED and name is not None:
                self.bind(item, name)
            else:
                raise FileFormatError(f"a result of '{node.name}' cannot be {kind}")
            item.meta.update(origin)
            found.append(item.meta["val"])
        return found

    def _rename(self, node: Node, name: str) -> None:
        """Give a node its name in the file; FX calls one that Python or torch has in another way (``input_1``)."""
        self.alias(name, node)
        legal = self._legal.get(name, name)
        if node.name != legal:
            node.name = legal


def taken(items: list[Any]) -> Iterator[Any]:
    """The items of a list, each of which is taken out of it: the JSON of a node need not outlive the node's making."""
    items.reverse()
    while items:
        yield items.pop()


def read_graph(reader: GraphReader, data: dict[str, Any]) -> None:
    """Read a graph that is nothing but inputs, nodes and results: a branch, or the body of a loop."""
    reader.describe(data)
    for index, argument in enumerate(data["inputs"]):
        reader.placeholder(argument, f"arg{index}")
    for node in taken(data["nodes"]):
        reader.node(node)
    single = data.get("is_single_tensor_return", False)
    reader.output([reader.returned(argument) for argument in data["outputs"]], single=single)


def matches(value: Any, tensor: Tensor) -> bool:
    """Whether a tensor is what the file says about its value."""
    return isinstance(value, Tensor) and value.dtype == tensor.dtype and tuple(value.shape) == tuple(tensor.shape)
