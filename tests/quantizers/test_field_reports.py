"""Models distilled from public reports of what post-training quantization of exported graphs stumbles over.

Every product is quantized, or its verdict says why not; the result is near the float model; a saved and loaded model
gives the same bits; the user's model is left as it was.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from quant2e import CalibrationError, Quant2eError, load, quantize
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)

PER_CHANNEL = get_symmetric_quantization_config(is_per_channel=True)


def xnnpack():
    return XNNPACKQuantizer().set_global(PER_CHANNEL)


def x86():
    config = get_default_x86_inductor_quantization_config(reduce_range=False)
    return ComposableQuantizer([EmbeddingQuantizer(), X86InductorQuantizer().set_global(config)])


class Model(nn.Module):
    """``forward`` as a function of the model, which holds modules, parameters and buffers by name."""

    def __init__(self, function, parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def image_conv(inputs=3, outputs=8, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, **{"padding": 1, **options})


def tied_embedding():
    table, head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
    head.weight = table.weight
    return {"table": table, "head": head}


def cached_attention(m, x):
    m.cache[:, :1] = m.key(x)
    return m.out(F.layer_norm(m.cache + x, (8,)))


def rotary(m, x):
    query = m.query(x)
    return query * m.cos + torch.cat([-query[..., 4:], query[..., :4]], -1) * m.sin


def masked_attention(m, x):
    scores = m.linear(x) @ x.transpose(1, 2)
    never = torch.ones(5, 5, dtype=torch.bool).triu(1)
    return m.linear(scores.masked_fill(never, float("-inf")).softmax(-1) @ x)


def squeeze_excite(m, x):
    y = m.conv(x)
    return y * F.hardsigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(y, 1)))))


def conv_and_norm_of_it(m, x):
    y = m.conv(x)
    return m.norm(y) + y


def without_grad(m, x):
    with torch.no_grad():
        y = m.first(x)
    return m.second(y)


torch.manual_seed(0)
IMAGE = (torch.randn(2, 3, 12, 12),)
TOKENS = (torch.randn(2, 5, 8),)
ROWS = (torch.randn(4, 8),)
IDS = (torch.randint(0, 11, (2, 5)),)

MODELS = {
    "halves of a convolution, added": (lambda m, x: m.conv(x)[:, :4] + m.conv(x)[:, 4:], IMAGE, {"conv": image_conv()}),
    "one linear, two call sites": (lambda m, x: m.linear(F.relu(m.linear(x))) + x, TOKENS, {"linear": nn.Linear(8, 8)}),
    "one convolution and norm, twice": (
        lambda m, x: m.norm(m.conv(m.norm(m.conv(x)).relu())),
        (torch.randn(2, 8, 6, 6),),
        {"conv": image_conv(8, 8), "norm": nn.BatchNorm2d(8)},
    ),
    "tied embedding": (lambda m, x: m.head(m.table(x)), IDS, tied_embedding()),
    "norm without affine": (lambda m, x: m.norm(m.conv(x)), IMAGE,
        {"conv": image_conv(bias=False), "norm": nn.BatchNorm2d(8, affine=False)}),
    "norm in front": (lambda m, x: m.conv(m.norm(x)), IMAGE, {"conv": image_conv(), "norm": nn.BatchNorm2d(3)}),
    "convolution used beside its norm": (conv_and_norm_of_it, IMAGE, {"conv": image_conv(), "norm": nn.BatchNorm2d(8)}),
    "squeeze and excite": (squeeze_excite, IMAGE, {"conv": image_conv(), "down": nn.Conv2d(8, 4, 1),
        "up": nn.Conv2d(4, 8, 1)}),
    "chunks, reversed": (lambda m, x: torch.cat([*reversed(m.conv(x).chunk(2, 1)), x], 1), IMAGE,
        {"conv": image_conv()}),
    "one operand, twice": (lambda m, x: (m.conv(x) * m.conv(x) - torch.cat([m.conv(x)] * 2, 1)[:, :8]), IMAGE,
        {"conv": image_conv()}),
    "in place on a residual": (
        lambda m, x: F.relu_(m.second(F.relu_(m.first(x))) + x),
        (torch.randn(2, 8, 6, 6),),
        {"first": image_conv(8, 8), "second": image_conv(8, 8)},
    ),
    "attention with -inf": (masked_attention, TOKENS, {"linear": nn.Linear(8, 8)}),
    "multi-head attention": (lambda m, x: m.attention(x, x, x)[0], TOKENS,
        {"attention": nn.MultiheadAttention(8, 2, batch_first=True)}),
    "encoder with padding": (
        lambda m, x, padding: m.layer(x, src_key_padding_mask=padding),
        (*TOKENS, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])),
        {"layer": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)},
    ),
    "cache written by index": (cached_attention, (torch.randn(2, 1, 8),),
        {"key": nn.Linear(8, 8), "out": nn.Linear(8, 4), "cache": torch.zeros(2, 5, 8)}),
    "rotary": (rotary, TOKENS, {"query": nn.Linear(8, 8), "cos": torch.randn(5, 8).cos(),
        "sin": torch.randn(5, 8).sin()}),
    "recurrent between linears": (lambda m, x: m.linear(m.gru(m.linear(x))[1][0]), TOKENS,
        {"gru": nn.GRU(8, 8, batch_first=True), "linear": nn.Linear(8, 8)}),
    "spectrum": (lambda m, x: m.linear(torch.fft.rfft(m.linear(x)).abs().repeat(1, 2)[:, :8]), ROWS,
        {"linear": nn.Linear(8, 8)}),
    "weight norm": (lambda m, x: m.linear(x), ROWS, {"linear": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))}),
    "matmul by a parameter": (lambda m, x: x @ m.weight.t() + m.bias, TOKENS,
        {"weight": nn.Parameter(torch.randn(4, 8)), "bias": nn.Parameter(torch.randn(4))}),
    "no_grad in forward": (without_grad, ROWS, {"first": nn.Linear(8, 8), "second": nn.Linear(8, 8)}),
    "nested outputs": (lambda m, x: {"a": m.linear(x), "b": (None, x, [m.linear(x).relu()])}, ROWS,
        {"linear": nn.Linear(8, 8)}),
    "a number among the inputs": (lambda m, x, n: m.linear(x) * n, (*ROWS, 3), {"linear": nn.Linear(8, 8)}),
    "a vector": (lambda m, x: m.linear(x), (torch.randn(8),), {"linear": nn.Linear(8, 4)}),
    "half precision": (lambda m, x: m.linear(x), (torch.randn(4, 8).half(),), {"linear": nn.Linear(8, 8).half()}),
    "causal convolution": (lambda m, x: m.conv(F.pad(x, (2, 0))).relu(), (torch.randn(2, 4, 9),),
        {"conv": nn.Conv1d(4, 4, 3)}),
    "even kernel, same size": (lambda m, x: m.conv(x), IMAGE, {"conv": nn.Conv2d(3, 8, 4, padding="same")}),
    "reflected border": (lambda m, x: m.conv(x), IMAGE, {"conv": image_conv(padding_mode="reflect")}),
}  # fmt: skip
"""Name → forward, inputs, parts."""

PRODUCTS = ("conv1d", "conv2d", "linear", "addmm", "convolution")


def tensors(outputs):
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def decibels(expected: Tensor, actual: Tensor) -> float:
    noise = (expected.double() - actual.double()).square().mean().item()
    return 10 * math.log10(expected.double().square().mean().item() / max(noise, 1e-30))


def fresh_run(module, inputs):
    """Outputs of a copy: some of these models write their buffers."""
    return tensors(copy.deepcopy(module)(*inputs))


@pytest.mark.parametrize("quantizer", [xnnpack, x86])
@pytest.mark.parametrize("name", MODELS)
def test_a_reported_model(name, quantizer, tmp_path):
    function, inputs, parts = MODELS[name]
    model = Model(function, parts).eval()
    expected, before = fresh_run(model, inputs), copy.deepcopy(model.state_dict())
    result = quantize(model, inputs, quantizer(), [inputs, inputs])

    floats = [
        v.op.name for v in result.report.verdicts if v.kind == "float" and v.op.name.rstrip("_0123456789") in PRODUCTS
    ]
    assert floats == []
    assert all(verdict.reason for verdict in result.report.verdicts)
    outputs = fresh_run(result.module, inputs)
    assert min(decibels(a, b) for a, b in zip(expected, outputs, strict=True)) > 20

    result.save(tmp_path / "model.pt2")
    again = fresh_run(load(tmp_path / "model.pt2").module, inputs)
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_sizes_that_vary_behind_a_star(tmp_path):
    model = Model(lambda m, x: m.linear(x.flatten(1)), {"linear": nn.Linear(8, 4)}).eval()
    shapes = (({0: Dim("batch", min=1, max=64)},),)
    result = quantize(model, torch.randn(4, 2, 4), xnnpack(), [torch.randn(4, 2, 4)], dynamic_shapes=shapes)
    result.save(tmp_path / "model.pt2")
    x = torch.randn(7, 2, 4)
    assert torch.equal(load(tmp_path / "model.pt2")(x), result(x))


def two_parts():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 8), nn.ReLU()).eval()


def test_one_part_after_the_other():
    model = two_parts()
    first = quantize(model, IMAGE, XNNPACKQuantizer().set_module_type(nn.Conv2d, PER_CHANNEL), [IMAGE])
    second = quantize(first.module, IMAGE, xnnpack(), [IMAGE])
    assert [second.report.of(name).kind for name in ("conv2d", "flatten", "linear")] == ["float", "float", "static"]
    assert "quantized already" in second.report.of("conv2d").reason
    assert second.module.state_dict()["0.weight_quantized"].equal(first.module.state_dict()["0.weight_quantized"])
    assert decibels(model(*IMAGE), second(*IMAGE)) > 30


def test_nothing_is_left_to_quantize():
    done = quantize(two_parts(), IMAGE, xnnpack(), [IMAGE])
    with pytest.raises(Quant2eError, match="rule 'conv': its operands are quantized already"):
        quantize(done.module, IMAGE, xnnpack(), [IMAGE])


def test_data_that_is_not_a_number():
    with pytest.raises(CalibrationError, match="calibration batch 0 holds NaN in its input"):
        quantize(two_parts(), IMAGE, xnnpack(), [IMAGE[0] * float("nan")])


def written_through_a_view(m, x):
    m.w[0].add_(1)
    return m.last(F.linear(x, m.w))


def written_afterwards(m, x):
    y = F.linear(x, m.w)
    m.w[0].add_(1)
    return m.last(y)


def written_through_a_view_of_a_view(m, x):
    m.w.t()[0].mul_(1.5)
    return m.last(F.linear(x, m.w.t()))


@pytest.mark.parametrize("quantizer", [xnnpack, x86])
@pytest.mark.parametrize("function", [written_through_a_view, written_afterwards, written_through_a_view_of_a_view])
def test_a_weight_that_the_model_changes_is_no_constant(function, quantizer):
    torch.manual_seed(0)
    model, x = Model(function, {"w": torch.randn(4, 4), "last": nn.Linear(4, 4)}).eval(), torch.randn(8, 4)
    verdicts = quantize(copy.deepcopy(model), (x,), quantizer(), [x], min_sqnr_db=None).report
    assert verdicts.of("linear_1").kind == "static"
    assert "which changes a buffer" in verdicts.of("linear").reason
    assert not any(verdict.reason.startswith("a constant") for verdict in verdicts.verdicts)
