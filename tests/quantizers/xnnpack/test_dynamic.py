"""Dynamic XNNPACK: the graph has the scales that the runtime finds, one for each row and one for each image."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowering
from quant2e import capture, convert_pt2e, load, prepare_pt2e, prepare_qat_pt2e, quantize, to_integer
from quant2e.graph.qdq_ops import CHOOSE_PER_TOKEN, CHOOSE_QPARAMS, qd
from quant2e.integer import integer_report
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config
from quantizers.xnnpack import rules

EACH = torch.tensor([1.0, 100.0, 0.01]).reshape(3, 1, 1, 1)
IMAGES = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * EACH


def dynamic(**options):
    return XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True, **options)
    )


def sqnr_db(expected, found):
    signal, noise = expected.detach().square().sum(), (expected - found).detach().square().sum()
    return float(10 * torch.log10(signal / noise.clamp_min(1e-30)))


class Patches(nn.Module):
    """Images to tokens, and two linears that read the same ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.q, self.k = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, images):
        tokens = F.relu(self.patch(images)).flatten(2).transpose(1, 2)
        return self.q(tokens), self.k(tokens)


class Encoder(nn.Module):
    """A block of a transformer. Some channels of some tokens are large, as in trained ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.second_norm = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = self.norm(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.second_norm(x + self.down(F.gelu(self.up(x))))


def tokens():
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    x[:, 0, :3] *= 60
    return x


def float_and(result, x):
    with torch.no_grad():
        return sqnr_db(Encoder().eval()(x), result(x))


@pytest.mark.slow
def test_a_transformer_computes_in_the_runtime_what_its_graph_says(monkeypatch):
    x = tokens()
    result = quantize(Encoder().eval(), (x,), dynamic())
    program = lowering.to_executorch(result)
    assert program.report.per_row is None
    assert program.report.rewrites.keys().isdisjoint({"per_row", "per_image"})
    assert program.report.verification.sqnr_db > 80
    # before, the graph had one scale for the tensor: neither what ran nor as good
    monkeypatch.setattr(rules, "with_scale_for_each", lambda spec, granularity: spec)
    before = quantize(Encoder().eval(), (x,), dynamic())
    declared = lowering.to_executorch(before).report
    assert declared.per_row.sqnr_db > 80
    assert declared.verification.sqnr_db < 45
    assert float_and(result, x) > float_and(before, x) + 15


def test_a_scale_for_each_row_and_each_image_wherever_it_runs(tmp_path):
    result = quantize(Patches().eval(), (IMAGES,), dynamic())
    chosen = [n.target in CHOOSE_PER_TOKEN for n in result.module.graph.nodes if n.target in CHOOSE_QPARAMS]
    assert chosen == [True, True]  # of the images, and of the tokens that both linears read
    exact = Patches().eval()(IMAGES)
    for got, expected in zip(result(IMAGES), exact, strict=True):
        assert all(sqnr_db(e, g) > 35 for e, g in zip(expected[[0, 1]], got[[0, 1]], strict=True))
    result.save(tmp_path / "m.pt2")
    integers = to_integer(result.module, strict=True)
    kinds = {v.op for v in integer_report(integers).verdicts if v.integer}
    assert kinds == {"aten.conv2d.default", "aten.linear.default"}
    onnx = lowering.to_onnx(result, path=tmp_path / "m.onnx")
    for runs in (load(tmp_path / "m.pt2"), integers, onnx):
        for got, expected in zip(runs(IMAGES), result(IMAGES), strict=True):
            assert sqnr_db(expected, got) > 100


@pytest.mark.slow
def test_a_scale_for_each_image_in_the_runtime():
    program = lowering.to_executorch(quantize(Patches().eval(), (IMAGES,), dynamic()))
    assert program.report.rewrites["per_image"] == 1
    assert len(program.report.partitions) == 1
    assert program.report.notes == ()
    assert program.report.verification.sqnr_db > 100


def test_one_image_needs_no_other():
    """Results do not depend on what else is in the batch."""
    gm = convert_pt2e(prepare_pt2e(capture(Patches().eval(), (IMAGES,)), dynamic()))
    shuffled = gm(IMAGES.flip(0))
    for got, expected in zip(shuffled, gm(IMAGES), strict=True):
        assert torch.allclose(got.flip(0), expected, rtol=1e-5, atol=1e-7)


def test_batches_of_one_image_have_the_spelling_that_every_workflow_knows():
    one = IMAGES[:1]
    prepared = prepare_qat_pt2e(capture(Patches().train(), (one,)), dynamic(is_qat=True))
    prepared.eval()
    prepared(one)
    trained = convert_pt2e(prepared)
    for gm in (trained, convert_pt2e(prepare_pt2e(capture(Patches().eval(), (one,)), dynamic()))):
        (conv,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.conv2d.default)
        assert conv.args[0].target is qd.dequantize_per_tensor.tensor
    for got, expected in zip(trained(one), prepared(one), strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_training_sees_the_scales_that_convert_writes():
    prepared = prepare_qat_pt2e(capture(Patches().train(), (IMAGES,)), dynamic(is_qat=True))
    sum(y.square().mean() for y in prepared(IMAGES)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in prepared.parameters())
    prepared.eval()
    converted = convert_pt2e(prepared)
    for got, expected in zip(converted(IMAGES), prepared(IMAGES), strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_tensor_that_a_linear_and_a_convolution_read_has_both():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.l = nn.Conv2d(3, 4, 1), nn.Linear(6, 6)

        def forward(self, x):
            return self.c(x), self.l(x)

    result = quantize(Both().eval(), (IMAGES,), dynamic())
    specs = {p: g.spec for g in result.encodings.groups if g.encoding == "dynamic" for p in g.points}
    assert sorted(spec.split(", ")[-2] for spec in specs.values()) == ["dynamic per image", "dynamic per token"]


def test_numbers_that_the_runtime_has_not_are_said():
    quantizer = dynamic(act_qmin=-127)
    result = quantize(Patches().eval(), (IMAGES,), quantizer)
    assert "dynamic: activations are affine in [-128, 127], as XNNPACK quantizes at run time" in result.report.notes
    assert {group.quant_min for group in result.encodings.groups if group.encoding == "dynamic"} == {-128}
