"""The table of integer forms: it covers what the shipped quantizers annotate."""

from __future__ import annotations

import pytest
import torch

from quant2e import Quant2eError, to_integer
from quant2e.annotation.pattern import Either, Op
from quant2e.integer.rewrite import FORMS
from tests.quant2e.integer.graphs import Draw, Writer
from tests.quant2e.integer.test_graph import x86, xnnpack

aten = torch.ops.aten


def targets(pattern):
    """Every op that a pattern names."""
    if isinstance(pattern, Either):
        return set().union(*map(targets, pattern.choices))
    if isinstance(pattern, Op):
        return set(pattern.targets).union(*map(targets, (*pattern.operands, *dict(pattern.keywords).values())))
    return set()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("make", [xnnpack, x86])
def test_what_quantizers_annotate_has_an_integer_form(make, dynamic):
    """In-place spellings become functional first. Attention as one op has values and probabilities in float."""
    quantizer = make(is_dynamic=dynamic)
    named = set().union(*(targets(rule.pattern) for config in quantizer.configs() for rule in quantizer.table(config)))
    assert aten.linear.default in named
    without = {target for target in named if not target._schema.is_mutable} - set(FORMS)
    assert without - {aten.scaled_dot_product_attention.default} == set()


def test_what_reads_memory_by_strides_stays_float_with_that_reason():
    draw = Draw(0)
    grid = draw.grid()
    writer = Writer()
    x = writer.input(draw.integers([4, 8], grid), grid)
    gm = writer.finish(writer.q(writer.op(aten.as_strided.default, x, [2, 8], [8, 1]), grid))
    with pytest.raises(Quant2eError, match="'as_strided_default' .*: it reads memory by strides"):
        to_integer(gm, strict=True)
    assert torch.equal(to_integer(gm)(*writer.inputs)[0], writer.results[0])
