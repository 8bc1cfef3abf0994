"""Lookups in tables of 4 bits: two values to a byte in memory, and the rows that are read as they were."""

import pytest
import torch
from torch import nn

from lowering import to_inductor
from lowering.inductor.rewrites.embedding import gathered_rows
from lowering.inductor.rewrites.graph import private_copy
from lowering.inductor.rewrites.pipeline import REWRITES
from quant2e import quantize
from quant2e.graph.attributes import tensor_at
from quant2e.passes import run
from quantizers import EmbeddingQuantizer

IDS = torch.tensor([[0, 49, 3], [3, 7, 48]])


class Table(nn.Module):
    def __init__(self, columns=64, bag=False):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.EmbeddingBag(50, columns, mode="mean") if bag else nn.Embedding(50, columns)

    def forward(self, ids):
        return self.table(ids)


def quantized(recipe, **options):
    return quantize(Table(**options).eval(), (IDS,), EmbeddingQuantizer().set_global(recipe))


def tables(gm):
    return [tensor_at(gm, n) for n in gm.graph.nodes if n.op == "get_attr" and tensor_at(gm, n).dim() == 2]


RECIPES = ("w4-g32", "w4-g32-asym", "w4", "w4-tensor", "w4-asym")


@pytest.mark.parametrize("bag", [False, True], ids=["lookup", "bag"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_table_of_4_bits_is_packed_and_bit_equal(recipe, bag):
    result = quantized(recipe, bag=bag)
    gm = private_copy(result.module)
    run(gm, REWRITES, compiled=False)
    integers = [t for t in tables(gm) if not t.is_floating_point() and t.dtype is not torch.int64 and len(t) == 50]
    assert (50, 32, torch.uint8) in [(*t.shape, t.dtype) for t in integers]
    assert (50, 64, torch.int8) not in [(*t.shape, t.dtype) for t in integers]
    assert torch.equal(gm(IDS)[0], result(IDS))


@pytest.mark.parametrize(("recipe", "columns"), [("w8", 64), ("w4", 7)], ids=["8 bits", "odd rows"])
def test_other_tables_stay_as_they_are(recipe, columns):
    result = quantized(recipe, columns=columns)
    gm = private_copy(result.module)
    assert run(gm, (gathered_rows,), compiled=False)
    assert all(t.dtype is not torch.uint8 for t in tables(gm))
    assert torch.equal(gm(IDS)[0], result(IDS))


@pytest.mark.inductor
@pytest.mark.parametrize("recipe", ["w4-g32-asym", "w4"])
def test_the_compiled_program_is_bit_equal(recipe):
    result = quantized(recipe)
    assert torch.equal(to_inductor(result)(IDS), result(IDS))
