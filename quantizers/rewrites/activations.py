"""Activations spelled out behind a product, as the op that they are.

x·sigmoid(x)  =  silu(x)        x·relu6(x + 3)/6  =  hardswish(x)        x/2·(1 + erf(x/√2))  =  gelu(x)        …

Kernels take in an activation by its name. What stands between a product and the one op in which all of its readers meet
is a function of one number. It is made of few kinds of ops, smooth ones and those that switch at a number; which
function it is, is told by its values: between, around and far beyond all numbers at which it may switch. The last op
keeps its name and its metadata; the others go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.annotation.pattern import short_name
from quant2e.graph.attributes import tensor_at
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.dataflow import is_pointwise, operand, operands
from quant2e.graph.edit import fold_into, folded_ops
from quant2e.graph.effects import is_in_place, writes
from quantizers.rewrites.matmul_to_linear import ORIGINAL_TARGET

aten = torch.ops.aten

_AT_MOST = 16
"""Ops of the longest spelling that is looked at."""

_CLOSE = 1e-5
"""How far a spelling may be from its activation, in proportion: constants are written with six digits or more."""

_STEPS = (0.0, *(sign * size for size in (1e-9, 1e-6, 1e-3, 0.02) for sign in (1, -1)))
"""How far from where a function may switch it is looked at, in proportion."""

_IDENTITY = (1.0,)
"""The slope with which leaky_relu is no activation."""

_PARTS = """
    add sub subtract rsub mul multiply div divide true_divide neg negative reciprocal pow square sqrt abs exp expm1
    sigmoid erf erfc tanh relu relu6 silu hardswish hardsigmoid hardtanh leaky_relu threshold clamp clip clamp_min
    clamp_max minimum maximum fmin fmax min max where gt ge lt le greater greater_equal less less_equal masked_fill
    clone alias detach
""".split()  # noqa: SIM905
"""Ops of which activations are made: smooth ones, and those that switch where a number is crossed. What tells a single
number from those next to it (eq, round), or cuts out values (hardshrink), is no part of any."""


def _shortest(number: float) -> float:
    """The number with six digits where these are the same float32, as of one that was written so; else itself."""
    short = round(number, 6)
    return short if torch.tensor(short).equal(torch.tensor(number)) else number


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
    _Activation("leaky_relu", F.leaky_relu, lambda at_minus_one: (_shortest(-at_minus_one),)),
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
        if (found := _recognized(gm, source, region, names)) is None:
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
    if not is_pointwise(node) or short_name(node.target).removesuffix("_") not in _PARTS or _rounds(node):
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


def _rounds(node: Node) -> bool:
    """Whether it is a division that rounds."""
    return operand(node, "rounding_mode") is not None


def _recognized(
    gm: GraphModule, source: Node, region: Sequence[Node], names: Sequence[str]
) -> tuple[_Activation, Sequence[Any]] | None:
    """The activation, of those named, that the last of ``region`` is of ``source``, with its further operands."""
    x = torch.linspace(-12, 12, 97, dtype=torch.float64)
    y = evaluate(gm, region[-1], {source: x})
    if y.dtype is not x.dtype or y.shape != x.shape:
        return None
    at_minus_one = float(y[x == -1])
    candidates = [(each, each.operands(at_minus_one)) for each in _ACTIVATIONS if each.name in names]
    close = [each for each in candidates if each[1] != _IDENTITY and _agree(*each, x, y)]
    if not close:
        return None
    x = _samples(_numbers(gm, region))
    y = evaluate(gm, region[-1], {source: x})
    return next((each for each in close if _agree(*each, x, y)), None)


def _agree(activation: _Activation, further: Sequence[Any], x: Tensor, y: Tensor) -> bool:
    """Whether ``y`` is what the activation makes of ``x``, but for what rounded constants cost.

    That is less where the activation is close to zero, and in proportion where it is large.
    """
    wanted = activation.compute(x, *further, **dict(activation.keywords))
    allowed = _CLOSE * x.abs().clamp(max=1) + _CLOSE / 10 * wanted.abs() + torch.finfo(x.dtype).eps
    return bool(((y - wanted).abs() <= allowed).all())


def _numbers(gm: GraphModule, region: Iterable[Node]) -> set[float]:
    """The numbers among the operands of ops, as literals, as tensors of one value, and those that schemas fill in."""
    found = {0.0, 1.0, 3.0, 6.0}
    for value in (value for node in region for value in operands(node).values()):
        number = tensor_at(gm, value) if isinstance(value, Node) else value
        number = number.item() if isinstance(number, Tensor) and number.numel() == 1 else number
        if isinstance(number, int | float) and math.isfinite(number):
            found.add(float(number))
    return found


def _samples(numbers: Iterable[float]) -> Tensor:
    """Where functions that switch at ``numbers`` are compared: from 1e-8 to 1e6 on either side of zero, off any grid,
    and close to where ``a·x + b`` and ``a·(x + b)`` are one of the numbers, for numbers a and b.
    """
    c = torch.tensor(sorted({sign * number for number in numbers for sign in (1, -1)}), dtype=torch.float64)
    sums, quotients = (c[:, None] - c).flatten(), (c[:, None] / c[c != 0]).flatten()
    both = (sums[:, None] / c[c != 0]).flatten(), (quotients[:, None] - c).flatten()
    switches = torch.cat([c, sums, quotients, *both]).unique()
    near = [switches + step * switches.abs().clamp(min=1e-6) for step in _STEPS]
    sizes = torch.logspace(-8, 6, 5003, dtype=torch.float64)
    line = torch.linspace(-12, 12, 4999, dtype=torch.float64)
    return torch.cat([sizes, -sizes, line, (switches[1:] + switches[:-1]) / 2, *near])
