"""Activations spelled out behind a product, as the op that they are.

x·sigmoid(x)  =  silu(x)        x·relu6(x + 3)/6  =  hardswish(x)        x/2·(1 + erf(x/√2))  =  gelu(x)        …

Kernels take in an activation by its name. What stands between a product and the one op in which all of its readers meet
is a function of one number, whatever it is made of; which one, is told by its values. The last op keeps its name and
its metadata; the others go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.graph.attributes import tensor_at
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.dataflow import is_pointwise
from quant2e.graph.edit import fold_into, folded_ops
from quant2e.graph.effects import is_deterministic, is_in_place, writes
from quantizers.rewrites.matmul_to_linear import ORIGINAL_TARGET

aten = torch.ops.aten

_CONVERSIONS = frozenset({aten.to.dtype, aten.to.device, aten._to_copy.default})

_AT_MOST = 16
"""Ops of the longest spelling that is looked at."""

_CLOSE = 1e-5
"""How far a spelling may be from its activation, on numbers up to 12: constants are written with six digits or more."""


@dataclass(frozen=True, slots=True)
class _Activation:
    """An activation, and the further operands of its op for the values that a spelling takes at -1."""

    name: str
    compute: Callable[..., Tensor]
    operands: Callable[[float], Sequence[Any]] = lambda _: ()
    keywords: tuple[tuple[str, Any], ...] = ()

    @property
    def target(self) -> Any:
        return getattr(aten, self.name).default


_ACTIVATIONS = (
    _Activation("relu", F.relu),
    _Activation("relu6", F.relu6),
    _Activation("silu", F.silu),
    _Activation("hardswish", F.hardswish),
    _Activation("gelu", F.gelu),
    _Activation("gelu", F.gelu, keywords=(("approximate", "tanh"),)),
    _Activation("tanh", torch.tanh),
    _Activation("leaky_relu", F.leaky_relu, lambda at_minus_one: (round(-at_minus_one, 6),)),
)


@dataclass(frozen=True, slots=True)
class ActivationsAsFused:
    """A pass. ``fused``: the activations, by name, that what computes a tensor takes in; nothing for other tensors."""

    fused: Callable[[Node], Sequence[str]]
    __name__: ClassVar[str] = "activations_as_fused"

    def __call__(self, gm: GraphModule) -> int:
        """Rewrite every spelling of one of them; returns how many."""
        nodes = list(gm.graph.nodes)
        position, constants = {node: place for place, node in enumerate(nodes)}, Constants(gm.graph)

        def respelled(source: Node, names: Sequence[str]) -> bool:
            return _respelled(gm, source, names, _regions(gm, source, position, constants))

        return sum(respelled(node, names) for node in nodes if (names := self.fused(node)))


def _respelled(gm: GraphModule, source: Node, names: Sequence[str], regions: Iterable[Sequence[Node]]) -> bool:
    for region in regions:
        if (found := _recognized(gm, source, region[-1], names)) is None:
            continue
        activation, operands = found
        *inner, root = region
        root.meta[ORIGINAL_TARGET] = root.target
        fold_into(root, *(name for node in inner for name in (*folded_ops(node), node.name)))
        root.target, root.args, root.kwargs = activation.target, (source, *operands), dict(activation.keywords)
        for node in reversed(inner):
            gm.graph.erase_node(node)
        return True
    return False


def _regions(
    gm: GraphModule, source: Node, position: Mapping[Node, int], constants: Constants
) -> Iterator[tuple[Node, ...]]:
    """What stands between ``source`` and an op in which all of its readers meet, smallest first, with that op."""
    known, waiting = dict.fromkeys([source]), {*source.users}
    while waiting and len(known) <= _AT_MOST:
        node = min(waiting, key=lambda each: position.get(each, 0))
        waiting.remove(node)
        if not _is_of_one_number(gm, node, known, constants):
            return
        known[node] = None
        if not waiting and len(known) > 2:
            yield (*known,)[1:]
        waiting.update(user for user in node.users if user not in known)


def _is_of_one_number(gm: GraphModule, node: Node, known: Mapping[Node, None], constants: Constants) -> bool:
    """Whether a node computes each of its values from one value of ``known``, and from numbers that are not trained."""
    if not is_pointwise(node) or node.target in _CONVERSIONS or not is_deterministic(node):
        return False
    others = [each for each in node.all_input_nodes if each not in known]
    if len(others) == len(node.all_input_nodes):
        return False
    if is_in_place(node) and any(len(written.users) > 1 for written in writes(node)):
        return False
    numbers = [tensor_at(gm, each) for each in others if each in constants]
    return len(numbers) == len(others) and all(
        number is not None and number.numel() == 1 and not number.requires_grad for number in numbers
    )


def _recognized(
    gm: GraphModule, source: Node, root: Node, names: Sequence[str]
) -> tuple[_Activation, Sequence[Any]] | None:
    """The activation that ``root`` is of ``source``, with its further operands; None where it is none of ``names``."""
    x = torch.linspace(-12, 12, 97, dtype=torch.float64)
    y = evaluate(gm, root, {source: x})
    if y.dtype is not x.dtype or y.shape != x.shape:
        return None
    at_minus_one = float(y[x == -1])
    for activation in _ACTIVATIONS:
        if activation.name in names:
            operands = activation.operands(at_minus_one)
            wanted = activation.compute(x, *operands, **dict(activation.keywords))
            if torch.allclose(y, wanted, rtol=0, atol=_CLOSE):
                return activation, operands
    return None
