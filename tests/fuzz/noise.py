"""A model of noise: what uniform rounding errors, one for each number that is rounded, do to a graph's results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE, qd

DRAWS = 4

MANY = 64
"""Draws where the mean of a few does not cover the error."""

SAFETY = 2.0
"""The errors' amplitude may be this many times the model's."""

MARGIN = 1.25
"""And this many times the largest of many draws."""


class Rounding(Interpreter):
    """Runs a Q/DQ graph in which nothing is rounded: every number between its bounds keeps its fraction.

    With a ``draw``, each is moved by as much as rounding may move it: uniformly by up to half a step. So are the
    weights, whose integers stand for any float that rounds to them: one draw moves them once, for every call.
    """

    def __init__(self, gm: GraphModule, draw: int | None) -> None:
        super().__init__(gm)
        self._generator = None if draw is None else torch.Generator().manual_seed(draw)
        self._of_weights = None if draw is None else torch.Generator().manual_seed(-1 - draw)
        self._constants: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        if n.target in QUANTIZE:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self._quantized(n.target, args, kwargs)
        if n.target in DEQUANTIZE:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if args[0].is_floating_point():
                return args[0]
            exact = super().run_node(n)
            source = n.args[0].name if isinstance(n.args[0], Node) else n.name
            if source not in self._constants:
                step = _step(n.target, args, kwargs, args[0])
                self._constants[source] = _moved(exact, step, self._of_weights)
            return self._constants[source].view(exact.shape)
        return super().run_node(n)

    def _quantized(self, target: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        x = args[0]
        integers = target(*args, **kwargs)
        undone = _UNDO[target]
        low, high = (undone(torch.full_like(integers, int(args[i])), *args[1:]) for i in _bounds_of(args))
        x = torch.minimum(torch.maximum(x, low), high)
        return _moved(x, _step(undone, (integers, *args[1:]), {}, integers), self._generator)


def _moved(x: Tensor, step: Tensor, generator: torch.Generator | None) -> Tensor:
    return x if generator is None else x + step * (torch.rand(x.shape, generator=generator) - 0.5)


_UNDO = {
    getattr(getattr(qd, f"quantize_{kind}"), overload): getattr(getattr(qd, f"dequantize_{kind}"), overload)
    for kind, overload in (("per_tensor", "default"), ("per_tensor", "tensor"), ("per_channel", "default"))
}


def _bounds_of(args: tuple[Any, ...]) -> tuple[int, int]:
    """Where the smallest and the largest integer stand: the last two before the dtype."""
    return len(args) - 3, len(args) - 2


def _step(dequantize: Any, args: tuple[Any, ...], kwargs: Any, like: Tensor) -> Tensor:
    """The step of each number: the difference that one integer makes."""
    zeros = torch.zeros_like(like)
    one: Tensor = dequantize(zeros + 1, *args[1:], **kwargs) - dequantize(zeros, *args[1:], **kwargs)
    return one


def understood(gm: GraphModule) -> bool:
    """Whether every quantize op of the graph is one that the model of noise has."""
    targets = {node.target for node in gm.graph.nodes}
    return not (targets & QUANTIZE) - set(_UNDO) and not any(
        node.op == "get_attr" and isinstance(getattr(gm, str(node.target), None), GraphModule)
        for node in gm.graph.nodes
    )


class Noise:
    """What rounding does to the float outputs of these calls: powers summed over elements and calls, one for each."""

    def __init__(self, gm: GraphModule, calls: Sequence[tuple[Tensor, ...]]) -> None:
        self._gm, self._calls = gm, calls
        self._smooth = [self._floats(call, None) for call in calls]

    def predicted(self) -> list[float]:
        """The mean of a few draws."""
        return [sum(powers) / DRAWS for powers in zip(*(self._powers(draw) for draw in range(DRAWS)), strict=True)]

    def largest(self) -> list[float]:
        """The largest of many draws: where few numbers are rounded, one of them may be far from the mean."""
        return [max(powers) for powers in zip(*(self._powers(draw) for draw in range(MANY)), strict=True)]

    def _powers(self, draw: int) -> list[float]:
        total = [0.0] * len(self._smooth[0])
        rounding = Rounding(self._gm, draw)
        for call, smooth in zip(self._calls, self._smooth, strict=True):
            for place, (a, b) in enumerate(zip(smooth, self._floats(call, rounding), strict=True)):
                total[place] += float((a - b).double().square().sum())
        return total

    def _floats(self, call: tuple[Tensor, ...], rounding: Rounding | None) -> list[Tensor]:
        with torch.no_grad():
            runner = rounding or Rounding(self._gm, None)
            found = runner.run(*(x.clone() for x in call), enable_io_processing=False)
        return [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point()]
