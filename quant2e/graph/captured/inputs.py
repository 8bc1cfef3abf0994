"""What a captured graph may be called with, checked on every call.

``torch.export`` writes the conditions a graph depends on (a fixed size, "divisible by 8") as a ``_guards_fn`` call
inside the graph. Quantizers, exporters, train and eval would all have to step around a module that computes nothing,
and it can be neither pickled nor re-exported. So it is taken out of the graph, and its conditions are kept here as
text, which `quant2e.graph.captured.conditions` interprets.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node, Proxy
from torch.fx import _pytree as fx_pytree
from torch.fx.graph import _PyTreeCodeGen

from quant2e.errors import CaptureError
from quant2e.graph.captured.calls import call_of
from quant2e.graph.captured.conditions import Condition, ConditionError, Path, path_of
from quant2e.graph.captured.serialized import spec_from_state, spec_state

_GUARD_MESSAGE = "Guard failed: "


def distinct(*example: Any) -> Any:
    """The same inputs with no tensor twice: torch.export takes two inputs that are one object for one input."""
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) in seen:
            return tensor.detach().requires_grad_(tensor.requires_grad)
        seen.add(id(tensor))
        return tensor

    return pytree.tree_map_only(Tensor, own, example)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Calling convention of a captured graph.

    ``names``: arguments of ``forward``, in order, flattened by ``spec`` (None: each argument is one input).
    ``conditions``: what must hold for the inputs, such as ``x.size()[0] == 1``.
    Raises `CaptureError` for a condition that cannot be checked.
    """

    names: tuple[str, ...]
    spec: pytree.TreeSpec | None
    conditions: tuple[str, ...]
    _read: tuple[Condition, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        paths = _readable(leaf_paths(self.names, self.spec)) if self.conditions else {}
        try:
            read = tuple(Condition(text, paths) for text in self.conditions)
        except ConditionError as error:
            raise CaptureError(f"the inputs of the graph have a condition that cannot be checked: {error}") from error
        object.__setattr__(self, "_read", read)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.names, spec_state(self.spec), self.conditions)

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise `CaptureError`, saying which input and what was expected, when a call does not fit."""
        bound = self._bind(args, kwargs)
        leaves = self._flatten(bound)
        if any(isinstance(leaf, Proxy) for leaf in leaves):
            return  # symbolic tracing: there is no value to look at
        for condition in self._read:
            if not condition.holds(leaves):
                raise CaptureError(
                    f"the graph was captured for inputs where {condition.text}; got {_describe(bound)}. "
                    "Capture the model again "
                    "with inputs like these, or with dynamic_shapes= when a size varies"
                )

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Values for the placeholders of the graph, in order; any input may be given by name. Raises `CaptureError`."""
        return self._flatten(self._bind(args, kwargs))

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        expected = f"the captured graph takes ({', '.join(self.names)})"
        if len(args) > len(self.names):
            raise CaptureError(f"{expected}, got {len(args)} positional inputs")
        bound = dict(zip(self.names, args, strict=False))
        for name, value in kwargs.items():
            if name not in self.names:
                raise CaptureError(f"{expected}, and '{name}' is not one of them: it was not given at capture")
            if name in bound:
                raise CaptureError(f"{expected}, got '{name}' twice: by position and by name")
            bound[name] = value
        if missing := [name for name in self.names if name not in bound]:
            raise CaptureError(f"{expected}, missing {', '.join(missing)}")
        return bound

    def _flatten(self, bound: Mapping[str, Any]) -> list[Any]:
        if self.spec is None:
            return list(bound.values())
        positional, keyword = self.spec.children()
        count = positional.num_children
        nested = (
            [bound[name] for name in self.names[:count]],
            {key: bound[name] for key, name in zip(keyword.context, self.names[count:], strict=True)},
        )
        if not _nested_as(nested, self.spec):
            raise CaptureError(f"the inputs are not nested as at capture: got {_describe(bound)}, expected {self.spec}")
        return list(fx_pytree.tree_flatten_spec(nested, self.spec))


def _rebuild(names: tuple[str, ...], spec: str | pytree.TreeSpec | None, conditions: tuple[str, ...]) -> Inputs:
    return Inputs(names, spec_from_state(spec), conditions)


def _nested_as(value: Any, spec: pytree.TreeSpec) -> bool:
    """Can ``value`` be flattened by ``spec``? The order of dict entries does not matter, nor does list against
    tuple.
    """
    if spec.is_leaf():
        return True
    children = spec.children()
    if spec.type in (dict, OrderedDict, defaultdict):
        return (
            isinstance(value, Mapping)
            and set(value) == set(_keys(spec))
            and all(_nested_as(value[key], child) for key, child in zip(_keys(spec), children, strict=True))
        )
    if spec.type in (list, tuple):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(children)
            and all(_nested_as(item, child) for item, child in zip(value, children, strict=True))
        )
    return bool(pytree.tree_structure(value) == spec)


def _keys(spec: pytree.TreeSpec) -> list[Any]:
    """Keys of a dict spec; a defaultdict's context also carries its factory."""
    return list(spec.context[1] if spec.type is defaultdict else spec.context)


class _Brief(str):
    """Text shown without quotes inside a container."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _describe(bound: Mapping[str, Any]) -> str:
    def brief(value: Any) -> Any:
        return _Brief(f"tensor{tuple(value.shape)}") if isinstance(value, Tensor) else value

    return ", ".join(f"{name}={pytree.tree_map(brief, value)}" for name, value in bound.items())


def read_inputs(gm: GraphModule) -> Inputs:
    """Calling convention of ``gm``: from its code generator, its placeholders and its guards, where it has them."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    codegen = gm.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        info = codegen.pytree_info
        names, spec = tuple(info.orig_args), info.in_spec
        paths = leaf_paths(names, spec)
    else:
        names, spec = tuple(str(node.target) for node in placeholders), None
        paths = names
    return Inputs(names, spec, tuple(dict.fromkeys([*value_conditions(placeholders, paths), *_guards(gm)])))


def inputs_of(gm: GraphModule) -> Inputs:
    """Calling convention of ``gm``: the one it was captured with, where it knows, or as its graph says."""
    own = getattr(gm, "inputs", None)
    return own if isinstance(own, Inputs) else read_inputs(gm)


def flat_inputs(gm: GraphModule, batch: Any) -> list[Any]:
    """Values for the placeholders of ``gm``, in order, from one item of data, as `call_of` reads it.

    Tensors are copied: the graph may write into its inputs. Raises `CaptureError` for inputs that do not fit.
    """
    args, kwargs = call_of(batch).copied()
    return inputs_of(gm).flat(args, kwargs)


def input_path(node: Node) -> str:
    """How a placeholder is reached from the arguments, as the user names them: ``x``, ``batch['mask']``.

    Names of nodes are others where an argument is called as a function of Python is, ``input``, or is nested.
    """
    gm = node.graph.owning_module
    if gm is None:
        return node.name
    convention = inputs_of(gm)
    paths = leaf_paths(convention.names, convention.spec)
    places: dict[Node, str] = dict(zip(node.graph.find_nodes(op="placeholder"), paths, strict=False))
    return places.get(node, node.name)


def leaf_paths(names: Sequence[str], spec: pytree.TreeSpec | None) -> tuple[str, ...]:
    """How each flattened input is reached from the arguments: ``x``, ``batch['mask']``, ``states[0]``."""
    if spec is None:
        return tuple(names)
    example = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    positional = spec.child(0).num_children
    keywords = dict(zip(spec.child(1).context, names[positional:], strict=True))
    paths = []
    for path, _ in pytree.tree_leaves_with_path(example):
        side, which = path[0], path[1]
        assert isinstance(side, pytree.SequenceKey)
        name = names[which.idx] if isinstance(which, pytree.SequenceKey) else keywords[getattr(which, "key", "")]
        paths.append(name + pytree.keystr(path[2:]))
    return tuple(paths)


def _readable(paths: Sequence[str]) -> dict[Path, int]:
    """Positions of the inputs by how they are reached, where that can be written in a condition."""
    found = {}
    for index, text in enumerate(paths):
        with suppress(ConditionError):
            found[path_of(text)] = index
    return found


def value_conditions(placeholders: Sequence[Node], paths: Sequence[str]) -> list[str]:
    """What the values of placeholders say about the inputs at ``paths``: dimensions, fixed sizes, constants."""
    known = _readable(paths).values()
    return [text for index in known for text in _conditions(placeholders[index], paths[index])]


def _conditions(node: Node, path: str) -> list[str]:
    if "val" not in node.meta:
        return []
    value = node.meta["val"]
    if value is None:
        return [f"{path} is None"]
    if isinstance(value, Tensor):
        fixed = [f"{path}.size()[{i}] == {size}" for i, size in enumerate(value.shape) if type(size) is int]
        return [f"{path}.dim() == {value.dim()}", *fixed]
    if isinstance(value, torch.SymInt):
        return [f"{path} // 1 == {path}"]  # a whole number
    if isinstance(value, float) and not math.isfinite(value):
        return [f"math.isnan({path})" if math.isnan(value) else f"{path} == {'-' if value < 0 else ''}math.inf"]
    return [f"{path} == {value!r}"] if isinstance(value, (int, float, str)) else []


def _guards(gm: GraphModule) -> list[str]:
    """Conditions in the guard functions that ``ExportedProgram.module()`` puts into the graph.

    torch compiles each condition into a function together with a message that spells it out; the message is read back.
    """
    found = []
    for node in guard_calls(gm):
        function = inspect.unwrap(gm.get_submodule(str(node.target)).forward)
        closure = [cell.cell_contents for cell in function.__closure__ or ()]
        for candidate in (function, *closure):
            constants = getattr(getattr(candidate, "__code__", None), "co_consts", ())
            messages = [c for c in constants if isinstance(c, str) and c.startswith(_GUARD_MESSAGE)]
            found += [message.removeprefix(_GUARD_MESSAGE) for message in messages]
    return found


def guard_calls(gm: GraphModule) -> list[Node]:
    """The calls of guard functions in the graph: they check the inputs and return nothing."""
    return [
        node
        for node in gm.graph.nodes
        if node.op == "call_module"
        and type(gm.get_submodule(str(node.target))).__name__ == "GuardsFn"
        and not node.users
    ]
