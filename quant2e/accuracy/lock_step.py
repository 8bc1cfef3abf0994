"""Lock step: a simulated graph run on all batches at once, node by node, so that layers can be changed on the way.

    for each node:    for each batch:    value = node(values before it)

When a layer is reached, its inputs of every batch are there, computed by the layers before it as they are by then: one
run is enough for what would otherwise take one for each layer. Held at a time are, of every batch, the tensors that are
still to be read, once as rounding makes them, and once in float where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.inputs import flat_inputs
from quant2e.graph.mutation import written_attributes
from quant2e.isolation import IsolatedRandomness


class BatchRun(Interpreter):
    """The values of one batch so far. ``rounded``: as the points make them; else in float.

    Buffers that the model writes to begin anew in every batch.
    """

    def __init__(self, simulated: SimulatedGraph, call: Call, *, rounded: bool) -> None:
        super().__init__(simulated.graph)
        self.rounded = rounded
        self._simulated = simulated
        self._state = {path: value.clone() for path, value in written_attributes(simulated.graph).items()}
        self.args_iter = iter(flat_inputs(simulated.graph, call.copied()))

    def step(self, node: Node) -> None:
        """Compute ``node``, and let go of what nothing reads behind it.

        Constants that it reads were rounded when they were first read, and are by now what they should be.
        """
        for point in node.all_input_nodes if self.rounded else ():
            if point in self._simulated.points and (value := self._simulated.constant(point)) is not None:
                self.env[point] = value
        self.env[node] = self.run_node(node)
        for done in self.user_to_last_uses.get(node, []):
            del self.env[done]

    def run_node(self, n: Node) -> Any:
        """The value of ``n``."""
        point = self._simulated.points.get(n)
        if point is None:
            return super().run_node(n)
        x = self.env[n.all_input_nodes[0]]
        return point.rounded(x) if self.rounded else x

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of the model, or this batch's own where the model writes to it."""
        return self._state[target] if target in self._state else super().get_attr(target, args, kwargs)

    def tensor(self, node: Any) -> Tensor | None:
        """The float value of an operand that was computed; None for other operands."""
        value = self.env.get(node) if isinstance(node, Node) else None
        return value if isinstance(value, Tensor) and value.is_floating_point() else None


Visit = Callable[[Sequence[BatchRun], Sequence[BatchRun]], None]
"""Called in front of a node with the runs of all batches: rounded, and in float where these are asked for."""


def in_lock_step(
    simulated: SimulatedGraph, calls: Sequence[Call], visits: Mapping[Node, Visit], *, also_float: bool = False
) -> None:
    """Run ``simulated`` on ``calls`` with all points rounded, and call each of ``visits`` in front of its node.

    A visit may change what the points behind it round to. Nothing is computed behind the last visit.
    """
    pending = set(visits)
    with torch.no_grad(), IsolatedRandomness():
        rounded = [BatchRun(simulated, call, rounded=True) for call in calls]
        exact = [BatchRun(simulated, call, rounded=False) for call in calls] if also_float else []
        for node in simulated.graph.graph.nodes:
            if node in visits:
                visits[node](rounded, exact)
                pending.discard(node)
                if not pending:
                    return
            for run in (*rounded, *exact):
                run.step(node)
