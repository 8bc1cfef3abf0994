"""The one way rewrites put nodes into a graph: each new node says where it came from and what it produces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node, map_arg

PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack")
"""Entries of ``node.meta`` that point back to the user's source."""


def emit(like: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A call of ``target`` right before ``like``, with the provenance of ``like`` and its own ``meta["val"]``."""
    graph = like.graph
    with graph.inserting_before(like):
        node = graph.call_function(target, args, kwargs)
    node.meta = {key: like.meta[key] for key in PROVENANCE if key in like.meta}
    values = map_arg((args, kwargs), lambda n: n.meta["val"])
    mode = detect_fake_mode([n.meta.get("val") for n in node.all_input_nodes])
    if mode is None:
        node.meta["val"] = target(*values[0], **values[1])
    else:
        with mode:
            node.meta["val"] = target(*values[0], **values[1])
    return node


def constant(module: GraphModule, like: Node, name: str, value: Tensor) -> Node:
    """A ``get_attr`` of a new buffer right before ``like``. ``name`` is made unique."""
    fresh, suffix = name, 0
    while hasattr(module, fresh):
        suffix += 1
        fresh = f"{name}_{suffix}"
    module.register_buffer(fresh, value)
    with like.graph.inserting_before(like):
        node = like.graph.get_attr(fresh)
    mode = detect_fake_mode([n.meta.get("val") for n in like.all_input_nodes] or [like.meta.get("val")])
    node.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode is not None else value
    return node


def number(module: GraphModule, like: Node, value: float) -> Node:
    """A float32 constant of one element right before ``like``, which broadcasts against any shape."""
    return constant(module, like, "number", torch.tensor([value], dtype=torch.float32))


def tensor_at(module: GraphModule, node: object) -> Tensor | None:
    """The parameter or buffer a ``get_attr`` node reads; None for anything else."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    owner: Any = module
    for part in str(node.target).split("."):
        owner = getattr(owner, part, None)
    return owner if isinstance(owner, Tensor) else None


def shape_of(node: Node) -> tuple[int | torch.SymInt, ...]:
    """Shape of what a node produces, symbolic where the program is dynamic."""
    return tuple(node.meta["val"].shape)


def drop_unused(module: GraphModule) -> None:
    """Remove dead nodes, then the parameters and buffers that nothing reads any more."""
    module.graph.eliminate_dead_code()
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    # a submodule that is called keeps its tensors
    called = tuple(f"{node.target}." for node in module.graph.nodes if node.op == "call_module")
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    for name in names:
        if name not in used and not name.startswith(called):
            path, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(path), leaf)
    module.recompile()
