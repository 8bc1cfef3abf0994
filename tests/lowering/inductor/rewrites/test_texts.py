"""Dropouts and convolutions for Inductor: the graph before and after, and why a rewrite does not apply elsewhere."""

import pytest

from lowering.inductor.rewrites.conv1d import convolutions_in_two_dimensions
from lowering.inductor.rewrites.fusion import idle_dropouts
from lowering.inductor.rewrites.graph import private_copy
from quant2e.graph.printer import graph_text
from quant2e.passes import run
from quant2e.passes.dead_code import remove_dead_code
from tests.lowering.inductor.rewrites.test_conv1d import LINE, u8
from tests.lowering.inductor.rewrites.test_pipeline import F, X, graph, weight

REWRITES = {
    "idle_dropout": (idle_dropouts, lambda m, x: F.dropout(x, 0.5, False).relu(), X),
    "conv1d": (convolutions_in_two_dimensions, lambda m, x: F.conv1d(u8(x), m.v()), LINE),
    "conv1d_fused": (convolutions_in_two_dimensions, lambda m, x: F.conv1d(u8(x), m.v(), padding=1).relu().exp(), LINE),
}


def rewritten(function, x):
    return private_copy(graph(function, x, w=weight(16, 16), v=weight(8, 8, 3)))


@pytest.mark.parametrize("name", REWRITES)
def test_before_and_after(name, golden):
    rewrite, function, x = REWRITES[name]
    gm = rewritten(function, x)
    before = graph_text(gm.graph)
    assert run(gm, (rewrite, remove_dead_code))[rewrite.name] == 1
    golden(f"rewrites/inductor/{name}", f"{before}\n\n=>\n\n{graph_text(gm.graph)}")


REFUSALS = [
    (idle_dropouts, lambda m, x: F.dropout(x, 0.5, True), X, "'dropout' is training"),
    (convolutions_in_two_dimensions, lambda m, x: F.conv1d(x, m.v()), LINE, "the input of 'conv1d' is not dequantized"),
]


@pytest.mark.parametrize(("rewrite", "function", "x", "reason"), REFUSALS, ids=[reason for *_, reason in REFUSALS])
def test_a_rewrite_that_does_not_apply_says_why(rewrite, function, x, reason):
    gm = rewritten(function, x)
    assert run(gm, (rewrite,)) == {}
    node = next(node for node in reversed(gm.graph.nodes) if node.op == "call_function")
    assert reason in rewrite.explain(node)
