"""Dead code elimination.

f(x) without readers  =  nothing, when f only returns a value;   a tensor no node reads leaves the module
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.nn import Module

from quant2e.graph.effects import is_random, writes
from quant2e.graph.mutation import observed_writes


def has_effect(node: Node) -> bool:
    """Does the node do more than return a value: write what others see, draw a random number, assert, call a module?"""
    if node.op not in ("call_function", "get_attr"):
        return True
    if isinstance(node.target, OpOverload) and not node.target._schema.returns:
        return True  # assertions and constraints on sizes
    if is_random(node) or observed_writes(node):
        return True
    return not writes(node) and node.is_impure(impure_random=False)


def remove_dead_code(gm: GraphModule) -> int:
    """Remove nodes that nothing reads and that have no effect, also in the bodies of control flow. Inputs stay.

    Returns how many were removed.
    """
    count = 0
    for module in gm.modules():
        if isinstance(module, GraphModule):
            before = len(module.graph.nodes)
            for node in reversed(module.graph.nodes):
                if not node.users and not has_effect(node):
                    module.graph.erase_node(node)
            removed = before - len(module.graph.nodes)
            if removed and module is not gm:
                module.recompile()
            count += removed
    return count


def prune_unused_attributes(gm: GraphModule) -> int:
    """Drop parameters, buffers, constants and submodules of ``gm`` that its graph does not read; returns how many.

    A module that the graph calls, or whose graph it runs, stays whole. Other attributes of ``gm`` stay.
    """
    used = {str(node.target) for node in gm.graph.nodes if node.op in ("get_attr", "call_module")}
    return _prune(gm, used)


def _prune(module: Module, used: Iterable[str]) -> int:
    direct: set[str] = set()
    below: dict[str, list[str]] = {}
    for path in used:
        name, _, rest = path.partition(".")
        if rest:
            below.setdefault(name, []).append(rest)
        else:
            direct.add(name)
    count = 0
    for table in (module._parameters, module._buffers):
        for name in [name for name in table if name not in direct]:
            del table[name]
            module._non_persistent_buffers_set.discard(name)
            count += 1
    for name in [n for n, v in vars(module).items() if isinstance(v, (Tensor, torch.ScriptObject)) and n not in direct]:
        delattr(module, name)
        count += 1
    for name, child in list(module._modules.items()):
        if name in direct:
            continue
        if child is None or name not in below:
            del module._modules[name]
            count += 1
        else:
            count += _prune(child, below[name])
    return count
