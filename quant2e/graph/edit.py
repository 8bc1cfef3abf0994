"""Graph edits: new nodes with the metadata of those they stand for, and tensors under free names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

PROVENANCE = ("nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn", "seq_nr")
"""Metadata that says where a node came from; copied to the nodes created on its behalf."""

FROM_NODE = "from_node"
"""Metadata of torch.export: which op of the first exported graph a tensor is. Numeric debuggers match tensors by it."""


def copy_provenance(node: Node, source: Node, *, value: Any = None) -> None:
    """Give a new node the origin of ``source``, and ``value`` as its ``val``."""
    for key in PROVENANCE:
        if key in source.meta:
            node.meta[key] = source.meta[key]
    if value is not None:
        node.meta["val"] = value


def stands_for(node: Node, tensor: Node) -> None:
    """Give a new node that holds the tensor of another one, rounded or as integers, the identity of that tensor."""
    if FROM_NODE in tensor.meta:
        node.meta[FROM_NODE] = tensor.meta[FROM_NODE]


def register_tensor(gm: GraphModule, path: str, value: torch.Tensor) -> str:
    """Register a buffer under ``path``, or the first free name that starts with it; returns the name."""
    *parents, leaf = path.split(".")
    owner: nn.Module = gm
    for part in parents:
        child = getattr(owner, part, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    name, number = leaf, 0
    while hasattr(owner, name):
        number += 1
        name = f"{leaf}_{number}"
    owner.register_buffer(name, value)
    return ".".join([*parents, name])
