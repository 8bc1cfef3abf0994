"""Inductor pipeline: a captured graph as calls of int8 kernels, and what was decided on the way.

copy the graph ─▶ cut out int8 regions, each one op ─▶ rewrite into the form that kernels take ─▶ keep from them
what they get wrong ─▶ choose an engine for each product ─▶ cut out steps that repeat ─▶ call the kernels
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from lowering.inductor.guard import keep_from_patterns
from lowering.inductor.kernel_selection import Engines, choose, choose_native
from lowering.inductor.kernels.engines import ENGINES, Engine, KernelChoice
from lowering.inductor.report import COMPUTED, REGION, InductorReport, Kernel, build_report
from lowering.inductor.rewrites.graph import any_layout, op_of, private_copy, results_as_captured
from lowering.inductor.rewrites.kernel_calls import kernel_calls
from lowering.inductor.rewrites.pipeline import REWRITES, one_dequantize_per_user
from lowering.inductor.rewrites.repeated_steps import RepeatedSteps
from lowering.native.cut import NO_CUT, Cut, cut_regions
from lowering.native.engine import NATIVE
from lowering.native.units.unit import fused_activation
from lowering.signature import Signature
from quant2e.passes import Promise, run
from quant2e.passes.dead_code import remove_dead_code

AS_CALLS = (kernel_calls, any_layout, results_as_captured, remove_dead_code)
"""Kernels write images in channels last, of which there is no view."""

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
        cut, native, wanted = (NO_CUT, {}, wanted) if whole else _with_regions(self.graph, wanted)
        run(self.graph, REWRITES, compiled=False)
        ops = {node.name: op_of(node) for node in self.graph.graph.nodes}
        refused = keep_from_patterns(self.graph)
        self._refused = {ops[name]: reason for name, reason in refused.items()}  # by the names that the user knows
        choices, self._float_bytes = choose(self.graph, refused, wanted, engines)
        self._in_regions = tuple(kernels_of(cut))
        inside = {kernel.tag for kernel in self._in_regions}
        self._choices = {**{name: choice for name, choice in native.items() if name in inside}, **choices}
        repeated = RepeatedSteps()
        run(self.graph, () if whole else (repeated,), compiled=False)
        self.steps = tuple(repeated.made)
        for graph in (self.graph, *(step.body for step in self.steps)):
            run(graph, AS_CALLS, compiled=False)
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
        return build_report(
            self._original, (*self._in_regions, *kernels), self._refused, self._choices, self._float_bytes
        )


def _with_regions(gm: GraphModule, wanted: Engines) -> tuple[Cut, Mapping[str, KernelChoice], Engines]:
    """Cut the int8 regions out of ``gm``: they, the engine of each product, and what is asked for the others."""
    choices, rest = choose_native(gm, wanted)
    if not any(choice.engine == NATIVE for choice in choices.values()):
        return NO_CUT, {}, rest
    return cut_regions(gm, [name for name, choice in choices.items() if choice.engine != NATIVE]), choices, rest


def kernels_of(cut: Cut) -> Iterator[Kernel]:
    """The ops that regions compute, for the report."""
    for region in cut.regions:
        for unit in region.units:
            activations = [node.name for node in unit.nodes if fused_activation(node) is not None]
            post_op = activations[0].rstrip("_0123456789") if activations else ""
            yield from (Kernel(REGION, node.name, post_op) for node in unit.nodes if node.target in COMPUTED)
