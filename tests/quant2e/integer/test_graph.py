"""The integer graph as a program: it exports, saves, loads, compiles, takes any batch, and needs nothing of ours."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quant2e
from quant2e import Quant2eError, convert_pt2e, integer_report, prepare_pt2e, quantize, to_integer
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)


class Net(nn.Module):
    """Dense and depthwise convolutions, a shortcut, pooling, a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.max_pool2d(F.relu(self.b(x) + x), 2)
        return self.c(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Text(nn.Module):
    """An embedding, a linear layer, gelu, a linear layer."""

    def __init__(self):
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, ids):
        return self.b(F.gelu(self.a(self.table(ids))))


def xnnpack(**options):
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, **options))


def x86(**options):
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(**options))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["xnnpack", "x86"])
def model(request):
    torch.manual_seed(0)
    quantizer = {"xnnpack": xnnpack, "x86": x86}[request.param]()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return quantize(
        Net().eval(), (X,), quantizer, [X, X + 0.1], dynamic_shapes=shapes, use_reference_representation=True
    )


def targets(gm):
    return {str(n.target).split(".")[0] for n in gm.graph.nodes if n.op == "call_function"}


def test_it_is_written_in_aten_only(model):
    assert targets(model.module) <= {"aten", "<built-in function getitem>"}
    assert "quantized_decomposed" not in model.module.code


def test_every_op_of_the_network_computes_in_integers(model):
    assert [v.reason for v in integer_report(model.module).verdicts if not v.integer] == []


def test_a_dynamic_batch_and_channels_last_change_nothing(model):
    whole = model(X)
    assert torch.equal(model(X[:1]), whole[:1])
    assert torch.equal(model(X.to(memory_format=torch.channels_last)), whole)


def test_it_exports_again_saves_and_loads(model, tmp_path):
    exported = torch.export.export(model.module, (X,), dynamic_shapes=model.dynamic_shapes)
    assert torch.equal(exported.module()(X), model(X))
    path = tmp_path / "integer.pt2"
    model.save(path)
    again = quant2e.load(path)
    assert torch.equal(again(X), model(X))
    assert torch.equal(again(X[:2]), model(X[:2]))
    assert any("integer representation (float32)" in note for note in again.report.notes)


def test_it_runs_in_a_process_that_has_torch_only(model, tmp_path):
    path, out = tmp_path / "integer.pt2", tmp_path / "out.pt"
    model.save(path)
    torch.save(X, tmp_path / "x.pt")
    script = (
        "import sys, torch\n"
        f"y = torch.export.load({str(path)!r}).module()(torch.load({str(tmp_path / 'x.pt')!r}))\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('quant2e', 'torchao')]\n"
        f"torch.save(y.detach(), {str(out)!r})\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(out), model(X))


@pytest.mark.inductor
@pytest.mark.parametrize("mode", ["float32", "fixed_point"])
def test_it_survives_compilation(mode):
    torch.manual_seed(0)
    quantized = quantize(Net().eval(), (X,), xnnpack(), [X])
    gm = to_integer(quantized.module, requantization=mode, strict=True)
    assert torch.equal(torch.compile(gm)(X), gm(X))


@pytest.mark.parametrize(
    "quantizer", [lambda: xnnpack(is_dynamic=True), lambda: x86(is_dynamic=True)], ids=["xnnpack", "x86"]
)
def test_dynamic_products_are_integers_between_floats(quantizer):
    torch.manual_seed(0)
    x = torch.randn(6, 16)
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5, bias=False)).eval()
    quantized = quantize(net, (x,), quantizer())
    gm = to_integer(quantized.module, strict=True)
    assert targets(gm) == {"aten"}
    products = [n for n in gm.graph.nodes if n.target is torch.ops.aten.matmul.default]
    assert [n.meta["val"].dtype for n in products] == [torch.int32, torch.int32]
    torch.testing.assert_close(gm(x), quantized(x), rtol=1e-5, atol=1e-5)


def test_embeddings_and_float_islands():
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (3, 7))
    quantizer = ComposableQuantizer([EmbeddingQuantizer(), x86()])
    quantized = quantize(Text().eval(), (ids,), quantizer, [ids])
    gm = to_integer(quantized.module)
    assert targets(gm) == {"aten"}
    assert {v.name: (v.integer, v.annotated) for v in integer_report(gm).verdicts} == {
        "embedding": (True, True),
        "linear": (True, True),
        "gelu": (True, True),
        "linear_1": (True, False),  # annotated, and read in float: nobody asks for its integers
    }
    torch.testing.assert_close(gm(ids), quantized(ids), rtol=1e-4, atol=2e-3)


def test_what_has_no_integer_form_is_listed_with_its_reason_and_refused_by_strict():
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (3, 7))
    quantized = quantize(Text().eval(), (ids,), x86(), [ids])
    with pytest.raises(Quant2eError) as caught:
        to_integer(quantized.module, requantization="power_of_two", strict=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 quantized ops have no integer form (power_of_two):"
    assert "'linear' (aten.linear.default): its scale changes by" in lines[1]
    assert lines[2] == "  'gelu' (aten.gelu.default): 'linear' has no integer form here"
    gm = to_integer(quantized.module, requantization="power_of_two")
    assert [v.name for v in integer_report(gm).left] == ["linear", "gelu"]
    torch.testing.assert_close(gm(ids), quantized(ids))


def test_convert_makes_it_and_leaves_its_inputs_alone():
    torch.manual_seed(0)
    prepared = prepare_pt2e(quant2e.capture(Net().eval(), (X,)), xnnpack())
    prepared(X)
    floats, integers = convert_pt2e(prepared), convert_pt2e(prepared, use_reference_representation=True)
    before = floats.code
    assert torch.equal(to_integer(floats)(X), integers(X))
    assert floats.code == before
    unfolded = convert_pt2e(prepared, use_reference_representation=True, fold_quantize=False)
    assert torch.equal(unfolded(X), integers(X))


def test_what_is_no_quantized_graph_is_refused():
    captured = quant2e.capture(Net().eval(), (X,))
    with pytest.raises(Quant2eError, match="no quantize or dequantize ops"):
        to_integer(captured)
    quantized = quantize(Net().eval(), (X,), xnnpack(), [X])
    with pytest.raises(Quant2eError, match="choose one of float32, fixed_point"):
        to_integer(quantized.module, requantization="bfloat16")
    integer = to_integer(quantized.module)
    with pytest.raises(Quant2eError, match="computes in integers already"):
        to_integer(integer)
    with pytest.raises(Quant2eError, match="has no integer report"):
        integer_report(captured)
