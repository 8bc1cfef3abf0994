"""Quantized tables in the runtimes: rows are picked as integers, and give the numbers of the Q/DQ graph."""

import itertools

import pytest
import torch
from torch import nn

import lowering
from lowering.inductor.rewrites.embedding import gathered_rows
from lowering.inductor.rewrites.graph import private_copy
from lowering.rewrites import apply
from lowering.rewrites.embedding_bag import decompose_embedding_bags
from quant2e import load, quantize
from quant2e.graph.qdq_ops import DEQUANTIZE
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
    assert again.encodings == quantized.encodings
    assert all(map(torch.equal, again(*IDS), quantized(*IDS)))
    sizes = [group.group_size for group in again.encodings.groups]
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


BAG_INPUTS = (torch.tensor([1, 2, 3, 39, 9, 9, 0, 3]), torch.tensor([0, 2, 2, 4, 8]), torch.rand(8))


class OneBag(nn.Module):
    """A bag; ids in two dimensions make bags of one length."""

    def __init__(self, flat=True, weighted=False, **kwargs):
        super().__init__()
        self.flat, self.weighted = flat, weighted
        self.bag = nn.EmbeddingBag(40, 32, **kwargs)

    def forward(self, ids, offsets, weights):
        if not self.flat:
            return self.bag(ids.view(2, 4), None, weights.view(2, 4) if self.weighted else None)
        return self.bag(ids, offsets, weights if self.weighted else None)


CASES = [
    ("offsets", "sum", None), ("offsets", "mean", 9), ("offsets", "max", 9), ("offsets", "mean", None),
    ("closed", "sum", 9), ("closed", "max", None), ("weighted", "sum", 9),
    ("one length", "sum", None), ("one length", "mean", 9), ("one length", "max", 9), ("one length", "max", None),
    ("weighted, one length", "sum", 9),
]  # fmt: skip


def opened(case, shapes=None):
    kind, mode, padding_idx = case
    flat, weighted = "one length" not in kind, "weighted" in kind
    model = OneBag(flat, weighted, mode=mode, padding_idx=padding_idx, include_last_offset=kind == "closed").eval()
    module = torch.export.export(model, BAG_INPUTS, dynamic_shapes=shapes).module(check_guards=False)
    assert apply(module, [decompose_embedding_bags]) == {"decompose_embedding_bags": 1}
    assert not any("embedding_bag" in str(node.target) for node in module.graph.nodes)
    return module, model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opened_bags_give_the_same_numbers(case):
    module, model = opened(case)
    torch.testing.assert_close(module(*BAG_INPUTS), model(*BAG_INPUTS))


def test_opened_bags_of_any_number():
    many, bags = torch.export.Dim("many", min=2, max=64), torch.export.Dim("bags", min=2, max=64)
    module, model = opened(("offsets", "mean", 9), ({0: many}, {0: bags}, {0: many}))
    for inputs in (BAG_INPUTS, (torch.tensor([9, 9, 5]), torch.tensor([0, 2]), torch.rand(3))):
        torch.testing.assert_close(module(*inputs), model(*inputs))


def test_a_bag_that_is_asked_for_its_sizes_stays():
    class Sizes(nn.Module):
        def forward(self, table, ids, offsets):
            bags, _, sizes, _ = torch.embedding_bag(table, ids, offsets, False, 1)
            return bags, sizes

    module = torch.export.export(Sizes(), (torch.randn(40, 32), *IDS)).module(check_guards=False)
    assert apply(module, [decompose_embedding_bags]) == {}


@pytest.mark.parametrize("kind", [(8, 0, True), (8, 0, False), (4, 16, True), (4, 16, False)])
def test_the_executorch_program(kind):
    quantized = result(kind, mode={True: "mean", False: "max"}[kind[2]], padding_idx=3)
    program = lowering.to_executorch(quantized)
    assert program.report.verification.sqnr_db > 100
    for got, wanted in zip(program(*IDS), quantized(*IDS), strict=True):
        torch.testing.assert_close(got, wanted)
    tables = [one for one in quantized.module.state_dict().values() if one.shape == (40, 32)]
    assert [one.dtype for one in tables] == [torch.int8, torch.int8]
    assert all(one.numpy().tobytes() in program.buffer for one in tables)
    # a float table, whole or by its first row, is nowhere in the file
    dequantized = [node for node in quantized.module.graph.nodes if node.target in DEQUANTIZE]
    values = torch.fx.Interpreter(quantized.module, garbage_collect_values=False)
    values.run(*IDS)
    assert len(dequantized) == 2
    assert all(values.env[node][0].numpy().tobytes() not in program.buffer for node in dequantized)
