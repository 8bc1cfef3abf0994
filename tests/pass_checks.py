"""What every pass of every pipeline is held to in the tests: it breaks no rule of a legal Q/DQ graph, and no result."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.utils import _pytree as pytree

from quant2e.convert.legality import LEGAL
from quant2e.graph.control_flow import graphs_of
from quant2e.graph.effects import writes
from quant2e.passes import Promise

LARGEST = 300
"""Graphs of more nodes are not run: what their ops do, small ones show."""
NOISE = 1e-4
"""Power of the difference over that of the result: the order of additions may move a value over a rounding edge."""


def watch(gm: GraphModule, promise: Promise):
    """A `quant2e.passes.runner.Watch`."""
    broken = rules_broken(gm)
    small = len(gm.graph.nodes) <= LARGEST  # before: rewrites may take ops apart
    expected = results(gm) if promise.result and small else None

    def check():
        nonlocal broken
        now = rules_broken(gm)
        fresh = {rule: count for rule, count in (now - broken).items() if rule not in promise.waived}
        assert not fresh, f"a Q/DQ graph became illegal: {fresh}"
        broken = now
        if expected is not None:
            found = results(gm)
            assert found is not None, "the graph does not run any more"
            assert len(found) == len(expected)
            for before, after in zip(expected, found, strict=True):
                assert_same(before, after)

    return check


def trusting(gm: GraphModule, promise: Promise):
    """A watch that looks away, for passes that are wrong on purpose."""
    return lambda: None


def rules_broken(gm: GraphModule) -> Counter[str]:
    """How often each rule of a legal Q/DQ graph is broken: graphs of other libraries do not keep all of them."""
    return Counter(name for node in gm.graph.nodes for name, rule in LEGAL if rule(node) is not None)


def results(gm: GraphModule) -> list[object] | None:
    """What the graph computes on made-up inputs; None where it or a body observes, or it cannot be run on them."""
    if any(node.op == "call_module" for _, part in graphs_of(gm) for node in part.graph.nodes):
        return None
    nodes = list(gm.graph.nodes)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            inputs = [made_up(node.meta["val"]) for node in nodes if node.op == "placeholder"]
            return pytree.tree_leaves(OnCopies(gm).run(*inputs, enable_io_processing=False))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None


class OnCopies(Interpreter):
    """Runs a graph on copies of the tensors that it writes to."""

    def __init__(self, gm: GraphModule):
        super().__init__(gm)
        self.copies: dict[int, Tensor] = {}
        self.copying = any(writes(node) for node in gm.graph.nodes)

    def get_attr(self, target, args, kwargs):
        value = super().get_attr(target, args, kwargs)
        if not self.copying or not isinstance(value, Tensor):
            return value
        return self.copies.setdefault(id(value), value.detach().clone())


def made_up(value: object) -> object:
    """A number or tensor for a placeholder: small integers, which are indices into anything."""
    if not isinstance(value, Tensor):
        return value.node.hint if isinstance(value, torch.SymInt) else value
    sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    if value.dtype.is_floating_point:
        return torch.randn(sizes, dtype=torch.float32).to(value.dtype)
    return torch.randint(0, 2, sizes).to(value.dtype)


def assert_same(before: object, after: object) -> None:
    if not isinstance(before, Tensor):
        assert before == after
        return
    assert isinstance(after, Tensor)
    assert (before.shape, before.dtype) == (after.shape, after.dtype)
    if not before.is_floating_point():
        assert before.numel() == 0 or (before.double() - after.double()).abs().max() <= 1
        return
    finite = before.isfinite() & after.isfinite()
    assert torch.equal(before[~finite].nan_to_num(7), after[~finite].nan_to_num(7))
    error = (before[finite].double() - after[finite].double()).square().sum()
    power = before[finite].double().square().sum()
    assert error <= NOISE * power + 1e-12 * before.numel(), (
        f"the result changed: {float(error / power):.2g} of its power"
    )
