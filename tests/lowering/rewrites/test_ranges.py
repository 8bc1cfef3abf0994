"""Ranges found at run time, of tensors that may be empty."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import lowering
from lowering.rewrites.ranges import plain_byte_ranges, plain_ranges
from quant2e import capture, convert_pt2e, load, prepare_pt2e, quantize, to_integer
from quant2e.graph.captured.module import copy_graph
from quantizers import X86InductorQuantizer, XNNPACKQuantizer

ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) + 3  # zero is in no row
SHAPES = ({0: Dim("rows", max=64)},)
QUANTIZERS = {"tokens": XNNPACKQuantizer, "tensor": X86InductorQuantizer}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def quantized(name, shapes=SHAPES):
    quantizer = QUANTIZERS[name]().set_global("w8a8-dynamic")
    return quantize(net(), (ROWS,), quantizer, dynamic_shapes=shapes, min_sqnr_db=None)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_no_rows_give_no_rows(name, tmp_path):
    result = quantized(name)
    result.save(tmp_path / "m.pt2")
    programs = [result, load(tmp_path / "m.pt2"), to_integer(result.module)]
    programs.append(lowering.to_onnx(result, path=tmp_path / "m.onnx"))
    for program in programs:
        assert program(ROWS[:0]).shape == (0, 4)
        assert torch.allclose(program(ROWS[:3]), result(ROWS[:3]), atol=1e-5)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZERS)
def test_no_rows_in_a_compiled_program(name):
    program = lowering.to_inductor(quantized(name))
    assert program(ROWS[:0]).shape == (0, 4)
    assert program.report.verification.max_steps <= 1


def test_no_rows_in_executorch():
    program = lowering.to_executorch(quantized("tokens"))
    assert program(ROWS[:0]).shape == (0, 4)


def test_one_zero_more_changes_no_range():
    """Sizes that are fixed, or at least 3, need none; the numbers are the same with and without it."""
    varying, fixed = quantized("tensor").module, quantized("tensor", None).module
    at_least = quantized("tensor", ({0: Dim("rows", min=3, max=64)},)).module
    kinds = [sum("new_zeros" in str(n.target) for n in gm.graph.nodes) for gm in (varying, fixed, at_least)]
    assert kinds == [2, 0, 0]
    assert torch.equal(varying(ROWS), fixed(ROWS))
    for rewrite in (plain_ranges, plain_byte_ranges):
        plain = copy_graph(varying)
        assert rewrite(plain) == 2
        plain.recompile()
        assert torch.equal(plain(ROWS), fixed(ROWS))
        assert rewrite(plain) == 0


def test_bytes_are_those_without_a_sign():
    quantizer = X86InductorQuantizer().set_global("w8a8-dynamic")
    gm = convert_pt2e(prepare_pt2e(capture(net(), (ROWS,), dynamic_shapes=SHAPES), quantizer))
    for node in gm.graph.nodes:
        if "choose_qparams" in str(node.target):
            node.args = (node.args[0], 0, 127, *node.args[3:])
    assert plain_byte_ranges(gm) == 0
