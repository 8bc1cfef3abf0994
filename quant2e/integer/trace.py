"""Tracing of an integer graph: its run, with a look at the tensors inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from quant2e.graph.captured.inputs import flat_inputs
from quant2e.isolation import IsolatedRandomness


class Tap(Interpreter):
    """Hands the tensors of the named nodes to ``see``, in the order of the graph."""

    def __init__(self, gm: GraphModule, names: Iterable[str], see: Callable[[str, Tensor], None]) -> None:
        super().__init__(gm)
        self._names, self._see = frozenset(names), see

    def run_node(self, n: Node) -> Any:
        """One node; its tensor is shown when it is wanted."""
        result = super().run_node(n)
        if n.name in self._names and isinstance(result, Tensor):
            self._see(n.name, result.detach())
        return result


def tensors(gm: GraphModule, names: Iterable[str], batch: Any) -> dict[str, Tensor]:
    """The tensors of the named nodes on one batch: a tensor, a tuple of inputs, or a dict of keyword inputs."""
    found: dict[str, Tensor] = {}
    with torch.no_grad(), IsolatedRandomness():
        Tap(gm, names, found.__setitem__).run(*flat_inputs(gm, batch), enable_io_processing=False)
    return found
