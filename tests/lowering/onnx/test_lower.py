"""ONNX files: what is in them, what onnxruntime runs on integers, and that it computes what the Q/DQ graph says."""

import logging
import os
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowering import to_onnx
from quant2e import LoweringError, capture, quantize
from quant2e.graph.qdq_ops import qd
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    recipe,
)
from tests.lowering.graphs import on_dynamic_grid, on_grid
from tests.quantizers.models import IMAGE, Attention, Of, Residual

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def xnnpack(given="w8a8"):
    return XNNPACKQuantizer().set_global(given)


def lowered(tmp_path, model, example, quantizer, **kwargs):
    torch.manual_seed(0)
    result = quantize(model.eval(), example, quantizer, [example], **kwargs)
    return result, to_onnx(result, path=tmp_path / "model.onnx")


def ops(program) -> list[str]:
    return [node.op_type for node in onnx.load(program.path).graph.node]


def constants(program) -> dict[str, np.ndarray]:
    return {c.name: onnx.numpy_helper.to_array(c) for c in onnx.load(program.path).graph.initializer}


class Cnn(nn.Module):
    """A residual network, two branches that meet in a concatenation, a classifier."""

    def __init__(self):
        super().__init__()
        self.body, self.left, self.right = Residual(), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.body(x), torch.cat([self.left(x), self.right(x)], 1)


def test_a_network_of_convolutions(tmp_path):
    batch = torch.export.Dim("batch", min=1, max=16)
    result, program = lowered(tmp_path, Cnn(), IMAGE, xnnpack(), dynamic_shapes=({0: batch},))
    assert program.report.verification.max_steps == 0.0
    assert program.report.integer_kernels == {"QGemm": 1, "QLinearAdd": 1, "QLinearConcat": 1, "QLinearConv": 5}
    assert program.report.float_products == ()
    assert program.report.opset == 21
    more = (torch.randn(5, 3, 8, 8),)
    assert all(torch.equal(a, b) for a, b in zip(program(*more), result(*more), strict=True))
    held = constants(program)
    weights = {name: value for name, value in held.items() if value.ndim > 1}
    assert {value.dtype for value in weights.values()} == {np.dtype(np.int8)}
    assert sum(value.size for value in held.values() if value.dtype == np.float32) < 200  # scales only
    graph = onnx.load(program.path).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim][1:] == [3, 8, 8]
    metadata = {m.key: m.value for m in onnx.load(program.path).metadata_props}
    assert {key for key in metadata if key.startswith("quant2e")} == {"quant2e.target", "quant2e_sha256"}
    assert metadata["quant2e.target"] == "onnxruntime"
    assert "session.x64quantprecision" in str(program.report)


def test_attention_static_and_dynamic(tmp_path):
    example = (torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.int64))
    mixed = ComposableQuantizer([X86InductorQuantizer().set_module_name("[qk]", "w8a8-dynamic"), xnnpack()])
    _, program = lowered(tmp_path, Attention(), example, mixed)
    assert program.report.verification.max_steps <= 1
    kernels = program.report.integer_kernels
    assert kernels["MatMulIntegerToFloat"] + kernels.get("DynamicQuantizeMatMul", 0) >= 2
    assert kernels["QGemm"] == 2
    assert ops(program).count("DynamicQuantizeLinear") == 1  # q and k read the same tensor
    assert [product.partition(":")[0].split()[0] for product in program.report.float_products] != []


class Decoder(nn.Module):
    """A table, a linear that is called twice, and a head."""

    def __init__(self):
        super().__init__()
        self.table, self.twice, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids):
        return self.head(self.twice(torch.relu(self.twice(self.table(ids)))))


@pytest.mark.parametrize("name", ["w8a8", "w8a8-dynamic"])
def test_a_table_and_a_weight_that_is_used_twice(tmp_path, name):
    ids = (torch.arange(6).reshape(2, 3),)
    products = xnnpack() if name == "w8a8" else X86InductorQuantizer().set_global(name)
    _, program = lowered(tmp_path, Decoder(), ids, ComposableQuantizer([EmbeddingQuantizer(), products]))
    assert program.report.verification.max_steps <= 0.001
    assert sum(program.report.integer_kernels.values()) == 3
    held = constants(program)
    integers = {v.shape: v.dtype for v in held.values() if v.ndim == 2 and v.dtype != np.float32}
    # what two products read is u8, so that onnxruntime need not make it so
    assert integers == {(40, 16): np.int8, (16, 16): np.uint8, (16, 4): np.int8}
    assert max(v.size for v in held.values() if v.dtype == np.float32) == 40


def test_integer_inputs_and_outputs(tmp_path):
    """int8 in and out, with parameters in the file; the ops at both ends compute on integers too."""
    result, program = lowered(tmp_path, Residual(), IMAGE, xnnpack(), int8_io=True)
    (x,), (y,) = result.quantized_io.inputs, result.quantized_io.outputs
    model = onnx.load(program.path)
    int8 = onnx.TensorProto.INT8
    assert [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)] == [int8, int8]
    published = {each.key: each.value for each in model.metadata_props}
    assert float(published["forward_input0_scale"]) == x.scale
    assert int(published["forward_output0_zp"]) == y.zero_point
    assert program.report.integer_kernels == {"QGemm": 1, "QLinearAdd": 1, "QLinearConv": 3}
    assert program.report.float_products == ()
    for seed in range(3):
        integers = x.quantize(torch.randn(IMAGE[0].shape, generator=torch.Generator().manual_seed(seed)) * 3)
        got = program(integers)
        assert got.dtype is torch.int8
        assert torch.equal(got, result(integers))


def test_reduced_ranges_are_kept(tmp_path):
    """0..127 stays 0..127: values beyond the calibrated range are clipped, between the two ops that kernels look
    for.
    """
    config = get_default_x86_inductor_quantization_config(reduce_range=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    rows = (torch.randn(4, 8),)
    result, program = lowered(tmp_path, model, rows, X86InductorQuantizer().set_global(config))
    assert program.report.integer_kernels == {"QGemm": 2}
    assert ops(program).count("Clip") == 2
    far = (rows[0] * 10,)
    assert (program(*far) - result(*far)).abs().max() < 1e-4 * result(*far).abs().max()


# ------------------------------------------------------------ graphs written out by hand


class Blocks(nn.Module):
    """Weights of four bits: in blocks along the rows, and per output channel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, shape in (("a", (24, 64)), ("b", (8, 24))):
            self.register_buffer(name, torch.randint(-8, 8, shape, dtype=torch.int8))
        self.register_buffer("a_scale", torch.rand(24, 2) * 0.1 + 0.01)
        self.register_buffer("b_scale", torch.rand(8) * 0.1 + 0.01)
        self.register_buffer("a_zero", torch.zeros(24, 2, dtype=torch.int64))
        self.register_buffer("b_zero", torch.zeros(8, dtype=torch.int64))
        self.bias = nn.Parameter(torch.randn(24))

    def forward(self, x):
        a = qd.dequantize_per_channel_group.default(
            self.a, self.a_scale, self.a_zero, -8, 7, torch.int8, 32, torch.float32
        )
        b = qd.dequantize_per_channel.default(self.b, self.b_scale, self.b_zero, 0, -8, 7, torch.int8)
        return F.linear(F.linear(x, a, self.bias), b)


def test_four_bits(tmp_path):
    x = torch.randn(3, 64)
    graph = capture(Blocks().eval(), (x,))
    program = to_onnx(graph, (x,), path=tmp_path / "four.onnx")
    assert program.report.verification.max_steps < 0.001
    assert program.report.integer_kernels == {"MatMulNBits": 1}
    assert program.report.constants["int4"] == (24 * 64 + 24 * 8 + 24 * 2 + 8) // 2
    assert "qdq_matmulnbits_accuracy_level" in program.report.notes[0]
    kinds = {c.data_type for c in onnx.load(program.path).graph.initializer if len(c.dims) > 1}
    assert kinds == {onnx.TensorProto.INT4, onnx.TensorProto.FLOAT}
    blocked = [n for n in onnx.load(program.path).graph.node for a in n.attribute if a.name == "block_size" and a.i]
    assert [[a.i for a in n.attribute if a.name == "block_size"] for n in blocked] == [[32]]


class RunTime(nn.Module):
    """Every way to find parameters at run time."""

    def forward(self, x):
        per_token, zeros = qd.choose_qparams_per_token_asymmetric.default(x, torch.int8)
        tokens = qd.quantize_per_token.default(x, per_token, zeros, -128, 127, torch.int8)
        tokens = qd.dequantize_per_token.default(tokens, per_token, zeros, -128, 127, torch.int8, torch.float32)
        scale, zero = qd.choose_qparams.tensor(x + 3, 0, 100, 2.0**-20, torch.uint8)
        low = qd.quantize_per_tensor.tensor(x + 3, scale, zero, 0, 100, torch.uint8)
        low = qd.dequantize_per_tensor.tensor(low, scale, zero, 0, 100, torch.uint8)
        symmetric = on_dynamic_grid(x, qd.choose_qparams_symmetric.tensor)
        return tokens, low, symmetric, on_dynamic_grid(x), on_grid(x, (0.02, 7)), on_grid(x, (0.02, 7), torch.int16)


def test_parameters_found_at_run_time(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 33)
    program = to_onnx(capture(RunTime().eval(), (x,)), (x,), path=tmp_path / "dynamic.onnx")
    data = x * 3 - 1
    expected = RunTime()(data)
    for got, wanted, step in zip(program(data), expected, (0.1, 0.2, 0.1, 0.1, 0.02, 0.02), strict=True):
        assert (got - wanted).abs().max() <= step
        assert (got - wanted).abs().mean() < 1e-3  # a tie here and there may round the other way
    assert "DynamicQuantizeLinear" in ops(program)


# ------------------------------------------------------------ targets, mistakes, and what must not happen


def test_tensorrt_takes_signed_integers_around_zero(tmp_path):
    symmetric = xnnpack(recipe("w8a8", activation={"symmetric": True}))
    model = Of(lambda m, x: F.relu(m.a(x)), a=nn.Conv2d(3, 4, 3))
    torch.manual_seed(0)
    result = quantize(model.eval(), IMAGE, symmetric, [IMAGE])
    program = to_onnx(result, path=tmp_path / "rt.onnx", target="tensorrt")
    held = constants(program)
    assert {v.dtype for v in held.values()} <= {np.dtype(np.int8), np.dtype(np.float32)}
    assert not any(v.any() for v in held.values() if v.dtype == np.int8 and v.ndim < 2)
    assert program.report.notes == ("compared in onnxruntime; tensorrt was not run here",)
    affine = quantize(model.eval(), IMAGE, xnnpack(), [IMAGE])
    before = program.path.read_bytes()
    with pytest.raises(LoweringError, match=r"zero points of 0 .*a zero point that is not 0.*'symmetric': True"):
        to_onnx(affine, path=program.path, target="tensorrt")
    assert program.path.read_bytes() == before


class Shift(nn.Module):
    def forward(self, x):
        return on_grid(x, (0.1, 3)) + 1


def graph():
    return capture(Shift().eval(), (torch.randn(2, 3),))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target": "coreml"}, "target 'coreml': to_onnx writes for 'onnxruntime', 'tensorrt'"),
        ({"example_inputs": None}, "needs example_inputs"),
        ({"example_inputs": (torch.randn(2), torch.randn(2))}, "cannot trace"),
    ],
)
def test_mistakes(tmp_path, kwargs, message):
    with pytest.raises(LoweringError, match=message):
        to_onnx(graph(), **{"example_inputs": (torch.randn(2, 3),), "path": tmp_path / "x.onnx", **kwargs})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_what_is_not_installed_is_said(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(LoweringError, match=rf"ONNX export needs {missing}: pip install quant2e\[onnx\]"):
        to_onnx(graph(), (torch.randn(2, 3),), path=tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("lowering.onnx.graph.in_form", lambda module, convention: _broken(module))
    path = tmp_path / "x.onnx"
    path.write_bytes(b"before")
    with pytest.raises(LoweringError, match="the ONNX file does not compute what its Q/DQ graph says"):
        to_onnx(graph(), (torch.randn(2, 3),), path=path)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]


def _broken(module):
    (add,) = (n for n in module.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    add.args = (add.args[0], 5)
    module.recompile()


class Bags(nn.Module):
    """Bags of two that start at fixed places, as ATen's op: the values and the three by-products of training."""

    def __init__(self, results):
        super().__init__()
        self.table, self.results = nn.Parameter(torch.randn(16, 8)), results

    def forward(self, indices):
        return torch.ops.aten.embedding_bag.default(self.table, indices, torch.tensor([0, 3]))[: self.results]


def test_by_products_of_bags_are_refused(tmp_path):
    shapes, indices = ({0: torch.export.Dim("n", min=1, max=8)},), torch.arange(5)
    program = to_onnx(
        capture(Bags(1), (indices,), dynamic_shapes=shapes), (indices,), path=tmp_path / "a.onnx", dynamic_shapes=shapes
    )
    assert program.report.verification.passed
    assert program.report.verification.batches == 2  # the example, and eight indices; one has no second bag
    (told,) = program.report.verification.left_out
    assert told.endswith("= 1, where the graph itself fails: offsets[-1] can not be greater than input's length 1 but "
                         "got offsets[-1] of 3")  # fmt: skip
    assert f"; not compared at {told}" in str(program.report.verification)
    with pytest.raises(LoweringError, match="the first result of 'embedding_bag'"):
        to_onnx(capture(Bags(4), (indices,)), (indices,), path=tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_other_inputs_are_refused_and_nothing_global_changes(tmp_path):
    def state():
        loggers = [logging.getLogger(n).level for n in ("", "torch.onnx", "onnxscript", "onnx_ir")]
        return loggers, list(logging.getLogger().handlers), list(warnings.filters), dict(os.environ)

    source = graph()
    code, before = source.code, state()
    program = to_onnx(source, (torch.randn(2, 3),), path=tmp_path / "x.onnx")
    assert state() == before
    assert source.code == code
    assert torch.onnx.is_in_onnx_export() is False
    with pytest.raises(LoweringError, match="dimension 0 of input 'x' is 4, and the program was compiled for 2"):
        program(torch.randn(4, 3))
    program.save(tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == program.path.read_bytes()
    unchecked = to_onnx(source, (torch.randn(2, 3),), path=tmp_path / "y.onnx", verify=False)
    assert unchecked.report.verification is None
    assert unchecked.report.integer_kernels is None


def test_inputs_by_keyword_and_inputs_that_nothing_reads(tmp_path):
    class Keywords(nn.Module):
        def forward(self, a, unused, *, b, c):
            return on_grid(a, (0.1, 3)) - 2 * b

    rows = [torch.full((2, 3), value) for value in (1.0, 2.0, 3.0, 4.0)]
    keywords = {"a": rows[0], "unused": rows[1], "b": rows[2], "c": rows[3]}
    source = capture(Keywords().eval(), (), keywords)
    program = to_onnx(source, keywords, path=tmp_path / "k.onnx")
    swapped = {"c": rows[0], "b": rows[1], "unused": rows[2], "a": rows[3]}
    assert torch.equal(program(**swapped), source(**swapped))


class BestBoxes(nn.Module):
    """A detector's end: the boxes of the best of 20 candidates, whose scores are a few integers."""

    def forward(self, scores, boxes):
        best = on_grid(scores, (0.1, 0)).topk(8, dim=-1)
        return best.values, boxes[best.indices]


def test_ties_may_be_ordered_otherwise(tmp_path):
    scores = torch.rand(20, generator=torch.Generator().manual_seed(0)).mul(1.2).sub(0.2)
    boxes = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    graph = torch.export.export(BestBoxes(), (scores, boxes)).module()
    program = to_onnx(graph, (scores, boxes), path=tmp_path / "model.onnx")
    assert program.verification.passed
    assert program.verification.choices == ("topk",)
    assert not torch.equal(program(scores, boxes)[1], graph(scores, boxes)[1])


SHAPES = ({0: torch.export.Dim("rows")},)


@pytest.mark.parametrize("opset", [17, *(pytest.param(x, marks=pytest.mark.slow) for x in (20, 22)), 23])
def test_another_version_of_onnx(tmp_path, opset):
    """Static, dynamic and grouped weights, with a number of rows that has no upper bound."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8), nn.LayerNorm(8))
    rows = (torch.randn(4, 32),)
    torch.manual_seed(0)
    for quantizer in (xnnpack(), X86InductorQuantizer().set_global("w4-g32")):
        result = quantize(model.eval(), rows, quantizer, [rows], dynamic_shapes=SHAPES, min_sqnr_db=None)
        program = to_onnx(result, path=tmp_path / "model.onnx", opset=opset, verify_inputs=[(torch.randn(9, 32),)])
        assert program.report.opset == opset
        assert program.verification.batches == 4  # the example, one row and many, and what was given
        (imported,) = [each.version for each in onnx.load(program.path).opset_import if each.domain == ""]
        assert imported == opset


def test_versions_that_cannot_be_written(tmp_path):
    with pytest.raises(LoweringError, match=r"opset 16: to_onnx writes the versions 17 to 23"):
        to_onnx(nn.ReLU(), (torch.randn(2),), path=tmp_path / "model.onnx", opset=16)

    class Wide(nn.Module):
        def forward(self, x):
            return on_grid(x, (0.01, 0), torch.int16)

    with pytest.raises(LoweringError, match=r"integers of 16 bits from opset 21 on, not in 20: .*int16"):
        to_onnx(Wide(), (torch.randn(2, 3),), path=tmp_path / "model.onnx", opset=20)
    assert not (tmp_path / "model.onnx").exists()
