"""Output weights: how much the model's output rests on each sample that a layer reads, a position of a text say.

    w_i = √ E ‖∂(vᵀ f(x)) / ∂z_i‖²,    v ~ N(0, 1)        z_i: what the layer makes of sample i, x: the input of f

For small errors δ_i of z_i the output is off by Σ J_i δ_i, whose square is that of the gradients of vᵀf(x), on average
over v (E[v vᵀ] = 1: the Gauss-Newton form of the squared error). A layer that minimises the error of its own result
counts every sample alike: padding, of which nothing arrives at the output, as much as the rest. That gradients of the
end weigh the Hessian of GPTQ is the idea of J. Kim et al., "GuidedQuant: Large Language Model Quantization via
Exploiting End Loss Guidance", ICML 2025, arXiv:2505.07004, with squared gradients of a loss. Here the output of the
float model takes the place of labels, and the weight is the root of their formula: under the squares few samples own
the sum, and a Hessian needs more of them than the weight has columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from quant2e.accuracy.algorithms.rounding.weight_layers import Use
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.inputs import flat_inputs
from quant2e.isolation import IsolatedRandomness

PROBES = 2
"""Directions v of the output: each takes a backward pass, and a sample's weight is over all channels of its result."""

OutputWeights = Mapping[Node, Sequence[Tensor | None]]
"""By op, for each item of data: float32 ``[samples, groups]``, as `Use.samples` gives them, of mean 1 over all data;
None where the item brought nothing.
"""


def output_weights(simulated: SimulatedGraph, calls: Sequence[Call], uses: Sequence[Use]) -> OutputWeights:
    """The weights of the samples of ``uses`` on ``calls``, with nothing rounded; all 1 where the output rests on none.

    Held at a time are the tensors that one backward pass of one item needs. Raises `Quant2eError` for a model without
    a float output that gradients reach.
    """
    found: dict[Node, list[Tensor | None]] = {use.op: [] for use in uses}
    generator = torch.Generator().manual_seed(0)
    with simulated.rounding(()), IsolatedRandomness():
        simulated.start_again()
        for call in calls:
            sizes = _gradient_powers(simulated, call, uses, generator)
            for use in uses:
                found[use.op].append(sizes[use.op])
        simulated.start_again()
    return {op: _of_mean_one(sizes) for op, sizes in found.items()}


class _Kept(Interpreter):
    """Runs a graph and keeps what some of its nodes make, with what is needed to come back to them."""

    def __init__(self, simulated: SimulatedGraph, ops: set[Node]) -> None:
        super().__init__(simulated.graph)
        self._ops = ops
        self.results: dict[Node, Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of the model, which gradients do not reach."""
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, n: Node) -> Any:
        """The value of ``n``."""
        value = super().run_node(n)
        if n in self._ops and isinstance(value, Tensor) and value.is_floating_point():
            if not value.requires_grad:
                value.requires_grad_(True)
            self.results[n] = value
        return value


def _gradient_powers(
    simulated: SimulatedGraph, call: Call, uses: Sequence[Use], generator: torch.Generator
) -> dict[Node, Tensor | None]:
    """√ Σ g² of the samples of each op over its channels and over the directions; None of ops that did not run."""
    run = _Kept(simulated, {use.op for use in uses})
    with torch.enable_grad():
        out = run.run(*flat_inputs(simulated.graph, call.copied()), enable_io_processing=False)
        ends = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not ends:
            raise Quant2eError(
                "this model has no float output that gradients reach, so nothing says what its output rests on"
            )
        probes = [
            torch.stack([(end * torch.randn(end.shape, generator=generator).to(end)).sum() for end in ends]).sum()
            for _ in range(PROBES)
        ]
    ran = [use for use in uses if use.op in run.results]
    powers: dict[Node, Tensor | None] = {use.op: None for use in uses}
    for place, probe in enumerate(probes):
        results = [run.results[use.op] for use in ran]
        gradients = torch.autograd.grad(probe, results, retain_graph=place < PROBES - 1, materialize_grads=True)
        for use, gradient in zip(ran, gradients, strict=True):
            power, before = use.channel_power(gradient), powers[use.op]
            powers[use.op] = power if before is None else before + power
    return {op: None if power is None else power.sqrt() for op, power in powers.items()}


def _of_mean_one(sizes: Sequence[Tensor | None]) -> list[Tensor | None]:
    there = [size for size in sizes if size is not None]
    if not there:
        return list(sizes)
    mean = torch.cat(there).double().mean(0)
    known = bool(torch.isfinite(mean).all())
    weights: list[Tensor | None] = []
    for size in sizes:
        if size is None:
            weights.append(None)
            continue
        ones = torch.ones_like(size)
        weights.append(torch.where(mean > 0, size / mean.to(size), ones) if known else ones)
    return weights
