"""Quantized tables in the runtimes: rows are picked as integers, and give the numbers of the Q/DQ graph."""

import itertools

import pytest
import torch
from torch import nn

import lowering
from lowering.inductor_graph import private_copy
from lowering.inductor_lookup import gathered_rows
from quant2e import load, quantize
from quant2e.dialect import DEQUANTIZE
from quantizers import EmbeddingQuantizer, get_embedding_quantization_config

KINDS = list(itertools.product((8, 4), (0, 16), (True, False)))  # bits, group size, symmetric


class Tables(nn.Module):
    """A table and a bag, the bag with everything that a bag can have."""

    def __init__(self, mode="sum", padding_idx=None):
        super().__init__()
        self.embed, self.bag = nn.Embedding(40, 32), nn.EmbeddingBag(40, 32, mode=mode, padding_idx=padding_idx)

    def forward(self, ids, offsets):
        return self.embed(ids.view(2, -1)), self.bag(ids, offsets)


IDS = (torch.tensor([1, 2, 3, 39, 9, 9, 0, 3]), torch.tensor([0, 2, 2, 7]))


def result(kind, *args, **kwargs):
    torch.manual_seed(0)
    bits, group_size, symmetric = kind
    config = get_embedding_quantization_config(bits=bits, group_size=group_size, symmetric=symmetric)
    return quantize(Tables(*args, **kwargs).eval(), IDS, EmbeddingQuantizer().set_global(config))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_dequantized_after_they_were_picked(kind):
    quantized = result(kind)
    copy = private_copy(quantized.module)
    gathered_rows(copy)
    copy.recompile()
    assert not any(node.target in DEQUANTIZE for node in copy.graph.nodes)
    for node in copy.graph.nodes:  # nothing float has as many rows as the table
        value = node.meta.get("val")
        assert not (isinstance(value, torch.Tensor) and value.is_floating_point() and tuple(value.shape) == (40, 32))
    for got, wanted in zip(copy(*IDS), quantized(*IDS), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 0, 9])
def test_bags_of_every_kind(mode, padding_idx):
    quantized = result((8, 0, True), mode, padding_idx)
    copy = private_copy(quantized.module)
    gathered_rows(copy)
    copy.recompile()
    assert torch.equal(copy(*IDS)[1], quantized(*IDS)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_files_keep_the_tables(kind, tmp_path):
    quantized = result(kind)
    quantized.save(tmp_path / "tables.pt2")
    again = load(tmp_path / "tables.pt2")
    assert again.recipe == quantized.recipe
    assert all(map(torch.equal, again(*IDS), quantized(*IDS)))
    sizes = [group.group_size for group in again.recipe.groups]
    assert sizes == [kind[1], kind[1]]


@pytest.mark.inductor
@pytest.mark.parametrize("kind", [(8, 0, False), (4, 16, True)])
def test_the_compiled_program(kind):
    quantized = result(kind, padding_idx=3)
    program = lowering.to_inductor(quantized)
    assert program.verification.sqnr_db > 100
    assert {op.reason for op in program.report.ops} == {
        "gathers integer rows, then dequantizes them: the result is float"
    }
