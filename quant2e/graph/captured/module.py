"""CapturedModule: a captured graph called like the user's model, and copied without copying tensors."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module

from quant2e.errors import CaptureError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.inputs import Inputs, guard_calls, input_path, read_inputs
from quant2e.graph.captured.modes import set_training
from quant2e.graph.captured.no_grad import set_detached
from quant2e.graph.captured.serialized import GraphState, graph_from_state, graph_state
from quant2e.graph.control_flow import graphs_of
from quant2e.graph.mutation import own_written_tensors

_MACHINERY = frozenset(vars(GraphModule({}, Graph()))) | {
    "_in_spec",
    "_out_spec",
    "eval",
    "train",
    "validate_inputs",
}
"""Attributes that torch gives to every GraphModule, or to every result of export: rebuilt, never copied."""


BOUNDS = "range_constraints"
"""Attribute of results of export: symbols of the sizes that vary, with their bounds. A pickle has no symbols."""

_TABLES = ("_parameters", "_buffers", "_modules")


class CapturedModule(GraphModule):
    """A GraphModule of ATen ops that switches between training and evaluation and checks what it is called with.

    ``inputs`` says what a call must look like; None: anything goes. Copies (``copy.deepcopy``) are complete: they have
    their own graph, keep parameters, non-persistent buffers, constants and their paths, and switch on their own. It can
    be pickled; see `quant2e.graph.captured.serialized` for what a pickle keeps.
    """

    inputs: Inputs | None
    converted: bool = False
    """Made by `convert_pt2e`: its weights are integers, and cannot be trained."""

    def __init__(self, root: Module | dict[str, Any], graph: Graph, class_name: str = "GraphModule") -> None:
        super().__init__(root, graph, class_name)
        self.inputs = getattr(root, "inputs", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph.

        Raises `CaptureError` when the inputs are not such as the graph was captured for, or a converted graph, switched
        to training, is run with gradients: its integer weights have none.
        """
        if self.converted and self.training and torch.is_grad_enabled():
            raise CaptureError(
                "a converted model cannot be trained: its weights are integers, without gradients. "
                "Train the model that "
                "prepare_qat_pt2e returned and convert it again; to run this one in training mode, use torch.no_grad()"
            )
        if self.inputs is not None and not torch.compiler.is_dynamo_compiling():
            self.inputs.check(args, kwargs)
            if self.converted:
                check_dtypes(self, Call(args, kwargs))
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compile the graph on the first call, when `copy_graph` left that open."""
        self.recompile()
        return self.forward(*args, **kwargs)

    @property
    def code(self) -> str:
        """Python source of the graph."""
        if "_code" not in vars(self):
            self.recompile()
        return str(self._code)

    def train(self, mode: bool = True) -> CapturedModule:
        """Switch to training (or evaluation) mode, in place: the flag, and the literals of the graph."""
        detached, switched = set_detached(self.graph, mode), set_training(self.graph, mode)
        if detached or switched:
            self.recompile()
        super().train(mode)
        return self

    def __repr__(self) -> str:
        """A few lines: captured, prepared or converted, and how large. ``str`` has the code, `graph_text` the graph."""
        nodes = [(graph, node) for _, graph in graphs_of(self) for node in graph.graph.nodes]
        called = (graph.get_submodule(str(n.target)) for graph, n in nodes if n.op == "call_module")
        observers = Counter(type(module).__name__ for module in called if hasattr(module, "calculate_qparams"))
        kind = "converted" if self.converted else "prepared" if observers else "captured"
        lines = [f"CapturedModule, {kind}: {len(nodes)} nodes, {observers.total()} observers"]
        lines += [f"  {count} {name}" for name, count in observers.most_common()]
        return "\n".join(lines)

    def __copy__(self) -> CapturedModule:
        return copy_graph(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        def leaf(value: Any) -> Any:
            return copy.deepcopy(value, memo)

        return _copy(self, leaf, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        own = {name: value for name, value in vars(self).items() if name not in _MACHINERY and name != BOUNDS}
        tables = {name: vars(self)[name] for name in (*_TABLES, "_non_persistent_buffers_set", "training")}
        return _rebuild, (graph_state(self.graph), {**own, **tables, "meta": _picklable(self.meta)})


_QUANTIZABLE = (torch.float32, torch.float16, torch.bfloat16)


def check_dtypes(gm: GraphModule, call: Call) -> None:
    """Raise `CaptureError`, naming the input, for a dtype that observers and quantize ops refuse: integers or float64
    where float32 was captured, and floats where something else was.
    """
    inputs = getattr(gm, "inputs", None)
    if not isinstance(inputs, Inputs):
        return
    for node, given in zip(gm.graph.find_nodes(op="placeholder"), inputs.flat(call.args, call.kwargs), strict=False):
        captured = node.meta.get("val")
        if not isinstance(captured, Tensor) or not isinstance(given, Tensor) or given.dtype == captured.dtype:
            continue
        if captured.dtype not in _QUANTIZABLE or given.dtype not in _QUANTIZABLE:
            path = input_path(node)
            raise CaptureError(
                f"input '{path}' has dtype {given.dtype}, and the model was captured with {captured.dtype}: "
                f"pass {path}.to({captured.dtype}), or capture the model with inputs like these"
            )


def _picklable(meta: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``gm.meta`` that can be pickled; what torch leaves there often cannot."""
    kept = {}
    for key, value in meta.items():
        try:
            pickle.dumps(value)
        except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError):
            continue
        kept[key] = value
    return kept


def _rebuild(graph: GraphState, attributes: dict[str, Any]) -> CapturedModule:
    new = CapturedModule({}, Graph())
    vars(new).update(attributes)
    new.graph = graph_from_state(graph)
    return new


def copy_graph(gm: GraphModule, *, compiled: bool = True) -> CapturedModule:
    """A copy of ``gm`` with its own graph and modules, which shares every parameter, buffer and constant with it.

    Node names, metadata (dicts are copied), the calling convention, attribute paths, ``gm.meta`` and the bodies of
    control flow are kept; submodules (observers, say) are new objects over the same tensors. Guards that torch put into
    the graph become conditions on the ``inputs`` of the copy. ``compiled=False``: the Python code of the graph is made
    on the first call, or by ``recompile``; for a copy that is going to be edited.
    """
    return _copy(gm, _shallow, {}, compiled=compiled)


def independent_copy(gm: GraphModule) -> CapturedModule:
    """A copy that writes to tensors of its own: running it leaves caches and counters of ``gm`` as they are."""
    copied = copy_graph(gm)
    own_written_tensors(copied)
    return copied


def allow_train_eval(gm: GraphModule) -> GraphModule:
    """Make ``train`` and ``eval`` work on any graph of ATen ops, in place. Returns ``gm``."""
    for module in gm.modules():
        if isinstance(module, GraphModule) and not isinstance(module, CapturedModule):
            for name in ("train", "eval"):  # the exporter's versions, which raise
                module.__dict__.pop(name, None)
            module.__class__ = type("GraphModuleImpl", (CapturedModule,), {})
            module.__dict__["inputs"] = None
            module.recompile()
    return gm


def move_exported_model_to_train(model: GraphModule) -> GraphModule:
    """PT2E's name for ``model.train()``, in place."""
    allow_train_eval(model).train()
    return model


def move_exported_model_to_eval(model: GraphModule) -> GraphModule:
    """PT2E's name for ``model.eval()``, in place."""
    allow_train_eval(model).eval()
    return model


allow_exported_model_train_eval = allow_train_eval
"""PT2E's name for `allow_train_eval`."""


def _copy(
    gm: GraphModule, leaf: Callable[[Any], Any], memo: dict[int, Any], *, compiled: bool = True
) -> CapturedModule:
    """Copy ``gm``; ``leaf`` copies (or shares) everything that is not a graph."""
    new = CapturedModule({}, Graph()) if compiled else uncompiled()
    memo[id(gm)] = new
    _fill(gm, new, leaf, memo)
    _relink(new, memo)
    for name, value in vars(gm).items():
        if name not in _MACHINERY:
            new.__dict__[name] = leaf(value) if name != "inputs" else value
    new.meta = leaf(gm.meta)
    new.training = gm.training
    guards = guard_calls(gm)
    if guards and new.inputs is None:
        new.inputs = read_inputs(gm)
    graph = _copy_nodes(gm.graph, frozenset(guards))
    if compiled:
        new.graph = graph
    else:
        take_graph(new, graph)
    return new


class _Postponed(CapturedModule):
    """Made without compiling the empty graph it begins with."""

    def recompile(self) -> Any:
        """Nothing, during construction."""


def uncompiled() -> CapturedModule:
    """A module without a graph and without code, to be filled; see `take_graph`."""
    new = _Postponed({}, Graph())
    new.__class__ = type("GraphModuleImpl", (CapturedModule,), {})
    return new


def take_graph(module: CapturedModule, graph: Graph) -> None:
    """Give a module its graph; its code is made on the first call, or by ``recompile``."""
    module._graph = graph
    graph.owning_module = module
    vars(module).pop("_code", None)


def _shallow(value: Any) -> Any:
    return dict(value) if type(value) is dict else value


def _fill(old: Module, new: Module, leaf: Callable[[Any], Any], memo: dict[int, Any]) -> None:
    """Give ``new`` the parameters, buffers and submodules of ``old``."""
    for name, parameter in old._parameters.items():
        new._parameters[name] = leaf(parameter)
    for name, buffer in old._buffers.items():
        new._buffers[name] = leaf(buffer)
    new._non_persistent_buffers_set = set(old._non_persistent_buffers_set)
    for name, child in old._modules.items():
        if child is None or type(child).__name__ == "GuardsFn":
            continue
        new._modules[name] = memo[id(child)] if id(child) in memo else _copy_child(child, leaf, memo)


def _relink(new: Module, memo: dict[int, Any]) -> None:
    """Let copied modules that hold others in lists, as observers hold what they derive from, hold the copies."""
    for module in new.modules():
        for name, value in vars(module).items():
            if type(value) is list and any(isinstance(item, Module) for item in value):
                vars(module)[name] = [memo.get(id(item), item) for item in value]


def _copy_child(child: Module, leaf: Callable[[Any], Any], memo: dict[int, Any]) -> Module:
    if isinstance(child, GraphModule):
        return _copy(child, leaf, memo)
    if leaf is not _shallow:
        copied: Module = leaf(child)
        return copied
    clone = type(child).__new__(type(child))
    memo[id(child)] = clone
    own_dicts = (dict, set)
    clone.__dict__.update({k: v.copy() if isinstance(v, own_dicts) else v for k, v in vars(child).items()})
    clone._modules = {}
    _fill(child, clone, leaf, memo)
    return clone


def _copy_nodes(graph: Graph, without: frozenset[Node]) -> Graph:
    new: dict[Node, Node] = {}
    copied = Graph(tracer_cls=graph._tracer_cls)
    for node in graph.nodes:
        if node in without:
            continue
        new[node] = copied.node_copy(node, new.__getitem__)
        if new[node].name != node.name:  # a name that fx would not choose itself
            new[node].name = node.name
    copied._codegen = copy.copy(graph._codegen)  # its parts are immutable
    return copied
