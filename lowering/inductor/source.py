"""InductorSource: the graph that is compiled, and how what comes out is compared with it.

model ─▶ `InductorSource` (graph, signature, example inputs) ─▶ a program or a package ─▶ `verified` against the graph
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from lowering.bounds import calls_at_bounds
from lowering.check import checked
from lowering.choices import Lower
from lowering.export import Lowerable, example_of, plain_graph_of, refuse_dtypes
from lowering.inductor.report import InductorReport
from lowering.signature import Signature
from lowering.state import Apart, State, from_start, own_graph, state_of
from lowering.verify import Bound, Verification
from quant2e.errors import LoweringError
from quant2e.graph.captured.calls import Call, call_of
from quant2e.isolation import tracing
from quant2e.quantized_model import QuantizedModel
from quant2e.report.encodings import Encodings
from quant2e.report.report import Report

BOUND = Bound(steps=1.0, sqnr_db=30.0)
"""What a program must reach. Fused float ops differ from eager ones in the last bit, which moves some numbers over
the edge between two integers, and in a deep network such steps travel: 45 to 50 dB over six transformer layers, and
43 dB where the graph rounds weights to bfloat16, which the int8 kernels do not. Wrong programs are far below:
saturated kernels measure 10 to 22 dB, a wrong pattern less than 10. A graph whose own noise is larger is held to that
(`lowering.own_noise.compare_within_noise`)."""


OTHERWISE = "The Q/DQ graph itself runs as it is, without a compiler"
"""What to do with a wrong program, where no op is to blame that could be left in float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InductorSource:
    """A graph to compile. ``example``: inputs of one call, where there are any.

    ``state``: what the graph wrote to, as it was when the source was made. ``report``, ``encodings``: of the quantized
    model, empty for a graph without them.
    """

    graph: GraphModule
    signature: Signature
    example: Call | None
    state: State
    report: Report = field(default_factory=lambda: Report(verdicts=()))
    encodings: Encodings = field(default_factory=lambda: Encodings("", ()))

    def batches(self, more: Iterable[Any] = (), takes: Callable[[Sequence[int]], bool] = bool) -> list[Call]:
        """What to run the program on: the example, also at the ends of the sizes that vary, and ``more``.

        ``takes``: whether the program has code for such sizes. Raises `LoweringError` when there is no example.
        """
        if self.example is None:
            raise LoweringError("verify=True runs the program, and there are no example inputs: pass example_inputs")
        return [self.example, *calls_at_bounds(self.signature, self.example, self.graph, takes), *map(call_of, more)]

    def part(self, graph: GraphModule) -> InductorSource:
        """The source of a part of the graph, which has the same inputs."""
        return source_of(graph, self.example, None, "a part of the graph")


def chosen_in(part: GraphModule, report: InductorReport) -> dict[str, str]:
    """The engines that were chosen for the ops of a part of a graph."""
    names = {node.name for node in part.graph.nodes}
    return {name: choice.engine for name, choice in report.engines.items() if name in names}


def source_of(model: Lowerable, example_inputs: Any, dynamic_shapes: Any, asker: str) -> InductorSource:
    """What a user gave, as a graph to compile; captured again where ``dynamic_shapes`` ask for it."""
    graph = plain_graph_of(model)
    if not isinstance(graph, GraphModule):
        raise LoweringError(
            f"{asker} takes a captured graph, not a {type(graph).__name__}: pass what quantize, convert_pt2e or "
            f"capture returned"
        )
    refuse_dtypes(graph, (torch.float16,), "Inductor")
    example = example_of(model, example_inputs)
    if dynamic_shapes is not None:
        graph = _with_dynamic_shapes(graph, example, dynamic_shapes)
    leaves = pytree.tree_leaves(example, is_leaf=lambda leaf: leaf is None) if example is not None else None
    graph = own_graph(graph)  # calls of the user's graph from now on change nothing that is compiled
    known: dict[str, Any] = (
        {"report": model.report, "encodings": model.encodings} if isinstance(model, QuantizedModel) else {}
    )
    return InductorSource(
        graph=graph, signature=Signature(graph, leaves), example=example, state=state_of(graph), **known
    )


def _with_dynamic_shapes(graph: GraphModule, example: Call | None, dynamic_shapes: Any) -> GraphModule:
    """The graph itself when it was captured with dynamic sizes; otherwise captured again with them."""
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
    if any(isinstance(size, torch.SymInt) for v in values if isinstance(v, Tensor) for size in v.shape):
        return graph
    if example is None:
        raise LoweringError("dynamic_shapes needs example_inputs, to capture the graph again with sizes that vary")
    try:
        with tracing(), torch.no_grad():
            exported = torch.export.export(_without_checks(graph), *example, dynamic_shapes=dynamic_shapes)
    except Exception as error:
        raise LoweringError(
            "the graph cannot be captured with these dynamic_shapes, because it was captured with "
            "fixed sizes at first: "
            f"pass dynamic_shapes to quant2e.quantize or capture instead. {type(error).__name__}: {error}"
        ) from error
    found = exported.module()
    assert isinstance(found, GraphModule)
    return found


def _without_checks(graph: GraphModule) -> GraphModule:
    """The graph without the module that holds its inputs to the sizes it was captured with."""
    nodes = copy.deepcopy(graph.graph)
    for node in list(nodes.nodes):
        if node.op == "call_module" and node.name == "_guards_fn" and not node.users:
            nodes.erase_node(node)
    return GraphModule(graph, nodes)


def verified(
    program: Callable[..., Any], graph: GraphModule, batches: Sequence[Call], what: str, lower: Lower
) -> Verification:
    """Compare ``program`` with ``graph``; raises `LoweringError` beyond `BOUND`, calling the program ``what``.

    ``lower``: lowers a part of the graph, without comparing it. The first batch is run twice: a program that wrote to
    its constants in the first call computes something else then.
    """
    batches = [batches[0], *batches]
    found = checked(what, program, graph, batches, lower, graph=graph, otherwise=OTHERWISE, bound=BOUND)
    _check_inputs_kept(program, graph, what, batches[0])
    return found


def _check_inputs_kept(program: Callable[..., Any], graph: GraphModule, what: str, call: Call) -> None:
    """Raise `LoweringError` when the program writes to an input that the graph leaves alone."""

    def after(run: Callable[..., Any]) -> list[Any]:
        own = call.copied()
        with from_start(run), torch.no_grad():
            run(*own.args, **own.kwargs)
        return [leaf for leaf in pytree.tree_leaves(own) if isinstance(leaf, Tensor)]

    for place, (got, wanted) in enumerate(zip(after(program), after(Apart(graph)), strict=True)):
        if not torch.equal(got.nan_to_num(), wanted.nan_to_num()):
            raise LoweringError(
                f"{what} writes to tensor {place} of its inputs, and the Q/DQ graph does not: report this with the "
                f"model; the Q/DQ graph itself is right"
            )
