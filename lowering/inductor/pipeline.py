"""Inductor pipeline: a captured graph in the form that its int8 patterns take, and what was decided on the way.

copy the graph ─▶ rewrite what the patterns miss ─▶ guard what they get wrong ─▶ choose an engine for each product
─▶ cut out steps that repeat ─▶ call the kernels that have no pattern
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from lowering.inductor.guard import keep_from_patterns
from lowering.inductor.kernel_selection import Engines, choose
from lowering.inductor.kernels.engines import ENGINES, Engine
from lowering.inductor.report import InductorReport, Kernel, build_report
from lowering.inductor.rewrites.graph import op_of, private_copy
from lowering.inductor.rewrites.kernel_calls import kernel_calls
from lowering.inductor.rewrites.pipeline import REWRITES, one_dequantize_per_user
from lowering.inductor.rewrites.repeated_steps import RepeatedSteps
from lowering.signature import Signature
from quant2e.passes import Promise, run
from quant2e.passes.dead_code import remove_dead_code

_TOLD_APART = Promise(waived=frozenset({"a dequantize undoes its quantize"}))


class Rewritten:
    """``model``, which stays as it is, rewritten for Inductor. ``wanted``: the engines asked for, of ``engines``.

    ``graph``: the rewritten copy. Every program made from it writes to the tensors that it writes to. ``steps``: graphs
    that it calls, unless ``whole``, to be compiled by themselves.

    Raises `LoweringError` for engines that do not exist.
    """

    def __init__(
        self, model: GraphModule, wanted: Engines, engines: Sequence[Engine] = ENGINES, *, whole: bool = False
    ) -> None:
        self._original = private_copy(model)
        self.graph = private_copy(model)
        run(self.graph, REWRITES, compiled=False)
        ops = {node.name: op_of(node) for node in self.graph.graph.nodes}
        refused = keep_from_patterns(self.graph)
        self._refused = {ops[name]: reason for name, reason in refused.items()}  # by the names that the user knows
        self._choices, self._float_bytes = choose(self.graph, refused, wanted, engines)
        repeated = RepeatedSteps()
        run(self.graph, () if whole else (repeated,), compiled=False)
        self.steps = tuple(repeated.made)
        for graph in (self.graph, *(step.body for step in self.steps)):
            run(graph, (kernel_calls, remove_dead_code), compiled=False)
            # last: the guard compares quant_min
            run(graph, (one_dequantize_per_user,), compiled=False, promise=_TOLD_APART)

    def flat(self, signature: Signature) -> GraphModule:
        """A copy that Inductor may consume, of tensors: it takes the inputs that ``signature`` says are taken."""
        graph = Graph()
        outputs: Any = graph.graph_copy(self.graph.graph, {})
        graph.output(tuple(leaf for leaf in outputs if isinstance(leaf, Node)))
        places = [node for node in graph.nodes if node.op == "placeholder"]
        for node, spec in zip(places, signature.inputs, strict=True):
            if not spec.taken:
                graph.erase_node(node)
        for node in graph.nodes:
            # values of the captured graph: other symbols, another shape environment
            node.meta = {key: value for key, value in node.meta.items() if key != "val"}
        return GraphModule(self.graph, graph)

    def report(self, kernels: Sequence[Kernel]) -> InductorReport:
        """What became of each quantized op, given the kernels in the graph that Inductor generated code for."""
        return build_report(self._original, kernels, self._refused, self._choices, self._float_bytes)
