"""Graph writer: an fx graph as JSON of torch's schema 8, the form that ``torch.export.load`` reads.

    y = aten.add.Tensor(x, 2)    {"target": "torch.ops.aten.add.Tensor", "inputs": [{"name": "self", "arg":
                                  {"as_tensor": {"name": "x"}}, "kind": 1}, …], "outputs": [{"as_tensor": …}], …}

A node with several results is one entry that names them; the ``getitem`` nodes that pick them apart are not written.
A tensor that the graph reads from its module is an input here, named by `quant2e.storage.writer.lifting`. Keys that
have a default in the schema are left out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from quant2e.errors import Quant2eError, where
from quant2e.graph.attributes import attribute
from quant2e.storage.reader.schema_numbers import LAYOUTS, MEMORY_FORMATS
from quant2e.storage.writer.lifting import free_name
from quant2e.storage.writer.values import Json, Values, device, dtype_number, real

Metadata = Callable[[Node], dict[str, str]]

_POSITIONAL, _KEYWORD = 1, 2
"""``ArgumentKind`` of torch's schema."""


def write_graph(graph: Graph, lifted: Mapping[str, str], values: Values, metadata: Metadata) -> Json:
    """``graph`` as JSON, without the inputs that ``lifted`` (attribute path → name) adds.

    Raises `Quant2eError`, with the place, for what the format cannot hold.
    """
    return _GraphWriter(graph, lifted, values, metadata).write()


def qualified_name(target: Any) -> str:
    """The name under which torch finds what a node calls: ``torch.ops.aten.add.Tensor``, ``_operator.mul``."""
    module = str(target.__module__)
    if module.startswith("torch._ops"):
        module = module.replace("torch._ops", "torch.ops", 1)
    return f"{module}.{target.__name__}"


class _GraphWriter:
    """State of one graph: what its values are, by name."""

    def __init__(self, graph: Graph, lifted: Mapping[str, str], values: Values, metadata: Metadata) -> None:
        self._graph, self._lifted, self._values, self._metadata = graph, lifted, values, metadata
        self._tables: dict[str, Json] = {name: {} for name in ("tensor", "sym_int", "sym_float", "sym_bool")}
        self._same: dict[str, str] = {}
        self._bodies: dict[str, str] = {}

    def write(self) -> Json:
        inputs: list[Json] = []
        nodes: list[Json] = []
        output: Json = {}
        for node in self._graph.nodes:
            try:
                if node.op == "placeholder":
                    inputs.append(self._input(node))
                elif node.op == "call_function" and node.target is not operator.getitem:
                    nodes.append(self._call(node))
                elif node.op == "output":
                    output = self._output(node)
                elif node.op in ("call_module", "call_method"):
                    raise Quant2eError("a file holds graphs of ops only: convert the graph before you save it")
            except Quant2eError as error:
                raise Quant2eError(f"{where(node)} cannot be saved: {error}") from error
        tables = {f"{name}_values": table for name, table in self._tables.items() if table or name != "sym_float"}
        return {"inputs": inputs, **output, "nodes": nodes, **tables}

    # ------------------------------------------------------------------------------------------------ nodes

    def _input(self, node: Node) -> Json:
        value = node.meta.get("val")
        if isinstance(value, (Tensor, SymInt)):
            return self._result(node.name, value)
        return self.argument(value)

    def _output(self, node: Node) -> Json:
        result = node.args[0]
        outputs = [self.argument(leaf) for leaf in pytree.tree_leaves(result)]
        return {"outputs": outputs, **({"is_single_tensor_return": True} if isinstance(result, Node) else {})}

    def _call(self, node: Node) -> Json:
        target = node.target
        if isinstance(target, OpOverload):
            inputs, outputs = self._by_schema(node, target), self._results_by_schema(node, target)
        else:
            inputs, outputs = self._as_called(node), self._results(node)
        made: Json = {"target": qualified_name(target), "inputs": inputs, "outputs": outputs}
        if isinstance(target, HigherOrderOperator):
            made["is_hop_single_tensor_return"] = isinstance(node.meta["val"], Tensor)
        if not (isinstance(target, OpOverload) and _returns_tensor(target)):
            made["name"] = node.name  # otherwise the name of the result
        return {**made, "metadata": self._metadata(node)}

    def _by_schema(self, node: Node, target: OpOverload) -> list[Json]:
        """Operands by their names in the op's schema. Whether one was given by position is said where it is not plain:
        without a word, a reader takes those that have no default by position, and the others by name.
        """
        made = []
        for index, argument in enumerate(target._schema.arguments):
            plain = not argument.has_default_value() and not argument.kwarg_only
            if argument.name in node.kwargs:
                value, kind = node.kwargs[argument.name], _KEYWORD if plain else None
            elif not argument.kwarg_only and index < len(node.args):
                value, kind = node.args[index], None if plain else _POSITIONAL
            else:
                continue
            entry = {"name": argument.name, "arg": self.argument(value, argument.type)}
            made.append(entry if kind is None else {**entry, "kind": kind})
        return made

    def _as_called(self, node: Node) -> list[Json]:
        """Operands of what has no schema: without a name by position."""
        positional = [{"name": "", "arg": self.argument(value)} for value in node.args]
        return positional + [{"name": name, "arg": self.argument(value)} for name, value in node.kwargs.items()]

    def _results_by_schema(self, node: Node, target: OpOverload) -> list[Json]:
        returns = target._schema.returns
        if not returns:
            return []
        value = node.meta["val"]
        if len(returns) > 1:
            return [self._element(node, index, item) for index, item in enumerate(value)]
        if isinstance(returns[0].real_type, torch.ListType) and isinstance(value, (list, tuple)):
            return [self._tensor_list(node, value)]
        return [self._result(node.name, value)]

    def _results(self, node: Node) -> list[Json]:
        value = node.meta["val"]
        if isinstance(value, (tuple, list)):
            return [self._element(node, index, item) for index, item in enumerate(value)]
        return [self._result(node.name, value)]

    def _element(self, node: Node, index: int, value: Any) -> Json:
        """One of several results, which may be a list of tensors."""
        picked = self._picked(node, index)
        if isinstance(value, (list, tuple)):
            if picked is not None:
                return self._tensor_list(picked, value)
            unused = (self._tensor(f"{node.name}_unused_{index}_{i}", item) for i, item in enumerate(value))
            return {"as_tensors": list(unused)}
        return self._result(picked.name if picked is not None else f"{node.name}_unused_{index}", value)

    def _tensor_list(self, node: Node, values: Sequence[Any]) -> Json:
        names = (self._picked(node, index) for index in range(len(values)))
        named = [f"{node.name}_unused_{i}" if one is None else one.name for i, one in enumerate(names)]
        return {"as_tensors": [self._tensor(name, value) for name, value in zip(named, values, strict=True)]}

    def _picked(self, node: Node, index: int) -> Node | None:
        """The first node that takes one of several results; others that take the same stand for it."""
        first = None
        for user in node.users:
            if user.target is not operator.getitem:
                raise Quant2eError(f"its results are used together by '{user.name}', and a file names them one by one")
            if user.args[1] != index:
                continue
            if first is None:
                first = user
            else:
                self._same[user.name] = first.name
        return first

    def _result(self, name: str, value: Any) -> Json:
        """The entry of what a node gives, and its description in the tables of values."""
        if value is None:
            return {"as_none": True}
        if isinstance(value, Tensor):
            return {"as_tensor": self._tensor(name, value)}
        if isinstance(value, (bool, SymBool)):
            table, described = "sym_bool", self._values.truth(value)
        elif isinstance(value, (int, SymInt)):
            table, described = "sym_int", self._values.size(value)
        elif isinstance(value, (float, SymFloat)):
            table, described = "sym_float", self._values.number(value)
        else:
            raise Quant2eError(f"it gives a {type(value).__name__}, which a file cannot hold")
        self._tables[table][name] = described
        return {f"as_{table}": {"as_name": name}}

    def _tensor(self, name: str, value: Any) -> Json:
        if not isinstance(value, Tensor):
            raise Quant2eError(f"it gives a list that holds a {type(value).__name__}: a file holds lists of tensors")
        self._tables["tensor"][name] = self._values.tensor(value)
        return {"name": name}

    # -------------------------------------------------------------------------------------------- arguments

    def argument(self, value: Any, kind: Any = None) -> Json:
        """One operand. ``kind``: its type in the op's schema, which says what an empty list is one of."""
        if isinstance(value, Node):
            return self._operand(value)
        if isinstance(value, (list, tuple)):
            return self._list(value, kind)
        return _literal(value)

    def _operand(self, node: Node) -> Json:
        if node.op == "get_attr" and str(node.target) not in self._lifted:
            return {"as_graph": self._body(node)}
        name = self._name(node)
        for table in ("sym_int", "sym_float", "sym_bool"):
            if name in self._tables[table]:
                return {f"as_{table}": {"as_name": name}}
        if name not in self._tables["tensor"] and node.op != "get_attr":
            raise Quant2eError(f"it reads '{node.name}', which is neither a tensor nor a number")
        return {"as_tensor": {"name": name}}

    def _name(self, node: Node) -> str:
        if node.op == "get_attr":
            return self._lifted[str(node.target)]
        return self._same.get(node.name, node.name)

    def _body(self, node: Node) -> Json:
        """A branch or body of control flow: a graph of its own, which takes all that it reads as operands."""
        path, owner = str(node.target), node.graph.owning_module
        body = None if owner is None else attribute(owner, path, None)
        if not isinstance(body, GraphModule):
            raise Quant2eError(
                f"'{path}' is a {type(body).__name__} that a body of control flow reads from its module: "
                "hand it to the body as an operand"
            )
        if path not in self._bodies:
            self._bodies[path] = free_name(path.replace(".", "_"), set(self._bodies.values()))
        return {"name": self._bodies[path], "graph": write_graph(body.graph, {}, self._values, self._metadata)}

    def _list(self, items: Sequence[Any], kind: Any) -> Json:
        if not items:
            return {_empty_list(kind): []}
        if all(isinstance(item, Node) or item is None for item in items):
            return self._operands(items)
        for form, key in _LISTS:
            if all(type(item) is form for item in items):
                return {key: [real(item) for item in items] if form is float else list(items)}
        for table, form in (("sym_int", int), ("sym_float", float), ("sym_bool", bool)):
            if all(
                type(item) is form or (isinstance(item, Node) and item.name in self._tables[table]) for item in items
            ):
                named = ({"as_name": i.name} if isinstance(i, Node) else _literal(i) for i in items)
                return {f"as_{table}s": list(named)}
        if all(isinstance(item, (list, tuple)) for item in items):
            return self._lists(items)
        kinds = ", ".join(sorted({_kind(item) for item in items}))
        raise Quant2eError(f"a list of {kinds} is nothing a file can hold")

    def _operands(self, items: Sequence[Node | None]) -> Json:
        entries = [None if item is None else self._operand(item) for item in items]
        found = {next(iter(entry)) for entry in entries if entry is not None}
        kind = found.pop() if len(found) == 1 else ""
        if kind not in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool") or (
            None in entries and kind != "as_tensor"
        ):
            raise Quant2eError("a list of operands of several kinds is nothing a file can hold")
        if None in entries:
            return {"as_optional_tensors": [{"as_none": True} if entry is None else entry for entry in entries]}
        return {f"{kind}s": [entry[kind] for entry in entries if entry is not None]}

    def _lists(self, items: Sequence[Sequence[Any]]) -> Json:
        flat = [each for item in items for each in item]
        if all(isinstance(each, Node) for each in flat):
            return {"as_nested_tensors": [[entry["as_tensor"] for entry in map(self._operand, item)] for item in items]}
        if all(type(each) is int for each in flat):
            return {"as_int_lists": [list(item) for item in items]}
        if all(type(each) is float for each in flat):
            return {"as_float_lists": [[real(each) for each in item] for item in items]}
        raise Quant2eError("a list of lists holds tensors, integers or floats only")


_LISTS = ((bool, "as_bools"), (int, "as_ints"), (float, "as_floats"), (str, "as_strings"))


def _returns_tensor(target: OpOverload) -> bool:
    returns = target._schema.returns
    return len(returns) == 1 and isinstance(returns[0].real_type, torch.TensorType)


def _empty_list(kind: Any) -> str:
    """What an empty list is a list of: by the op's schema; tensors, where there is none."""
    while isinstance(kind, (torch.OptionalType, torch.ListType)):
        kind = kind.getElementType()
    for form, key in (
        (torch.BoolType, "bools"),
        (torch.IntType, "ints"),
        (torch.FloatType, "floats"),
        (torch.StringType, "strings"),
    ):
        if isinstance(kind, form):
            return f"as_{key}"
    return "as_tensors"


def _kind(value: Any) -> str:
    """What a value is, in the words of its user: fx has lists and dicts of its own."""
    return type(value).__name__.removeprefix("immutable_")


def _literal(value: Any) -> Json:
    """A value that is no node."""
    if value is None:
        return {"as_none": True}
    for form, key in ((bool, "as_bool"), (int, "as_int"), (str, "as_string")):
        if isinstance(value, form):
            return {key: form(value)}
    if isinstance(value, float):
        return {"as_float": real(float(value))}
    if isinstance(value, complex):
        return {"as_complex": {"real": real(value.real), "imag": real(value.imag)}}
    if isinstance(value, torch.dtype):
        return {"as_scalar_type": dtype_number(value)}
    if isinstance(value, torch.device):
        return {"as_device": device(value)}
    if isinstance(value, torch.layout) and value in LAYOUTS:
        return {"as_layout": LAYOUTS[value]}
    if isinstance(value, torch.memory_format):
        return {"as_memory_format": MEMORY_FORMATS[value]}
    raise Quant2eError(f"an operand is a {_kind(value)}, which a file cannot hold")
