"""Small models, each one of a kind that a target takes in a form of its own: they lower, and compute what they did."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from lowering import package_inductor, to_executorch, to_inductor, to_onnx
from quant2e import LoweringError, quantize
from quantizers import X86InductorQuantizer, XNNPACKQuantizer
from tests.quantizers.models import Of


class Attention(nn.Module):
    """Attention as transformers write it by hand, with a class token read off the front."""

    def __init__(self, picks: bool):
        super().__init__()
        self.qkv, self.out, self.head, self.picks = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 4), picks

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, 2, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(batch, length, width)
        x = x + self.out(mixed)
        return self.head(x[:, 0] if self.picks else x)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, what it is captured with, and what else it is run on."""

    model: Callable[[], nn.Module]
    example: tuple[torch.Tensor, ...]
    shapes: Any = None
    more: tuple[tuple[torch.Tensor, ...], ...] = ()


def image(*sizes, seed=1):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def pooled(m, x):
    """A convolution, and every way to average over what hangs over the edge."""
    x = m.a(x)
    return (
        F.avg_pool2d(x, 3, 1, 1),
        F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
        F.avg_pool2d(x, 3, 2, ceil_mode=True, count_include_pad=False),
        F.avg_pool2d(x, (3, 2), 2, 1, divisor_override=5),
        F.avg_pool1d(x.flatten(2), 3, 2, 1, ceil_mode=True),
    )


LENGTH = {1: Dim("length", min=2, max=16)}
BATCH = {0: Dim("batch", min=1, max=32)}
TOKENS = image(2, 5, 8)
SEVEN = image(2, 1, 2, 1, 2, 1, 4)

CASES: dict[str, Case] = {
    "a class token, the length varies": Case(
        model=lambda: Attention(picks=True), example=(TOKENS,), shapes=(LENGTH,), more=((image(2, 9, 8),),)
    ),
    "attention viewed back": Case(model=lambda: Attention(picks=False), example=(TOKENS,)),
    "a convolution, the batch varies": Case(
        model=lambda: nn.Conv2d(3, 4, 3), example=(image(4, 3, 8, 8),), shapes=(BATCH,), more=((image(16, 3, 8, 8),),)
    ),
    "a product of two matrices": Case(
        model=lambda: Of(lambda m, x, y: (x + x) @ (y + y)), example=(image(4, 8), image(8, 5))
    ),
    "two towers": Case(
        model=lambda: Of(lambda m, x, y: torch.mm(m.a(x), m.b(y).t()), a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
        example=(image(4, 8), image(5, 8)),
        shapes=(({0: Dim("queries", max=9)}, None),),
    ),
    "a linear with a weight that is computed": Case(
        model=lambda: Of(lambda m, x, y: F.linear(m.a(x), m.b(y), m.c), a=nn.Linear(8, 8), b=nn.Linear(8, 8),
            c=nn.Parameter(torch.ones(5))),
        example=(image(4, 8), image(5, 8)),
    ),
    "batches times a matrix": Case(
        model=lambda: Of(lambda m, x, y: (x + x) @ (y + y)), example=(image(2, 3, 8, 8), image(8, 5))
    ),
    "seven dimensions": Case(model=lambda: Of(lambda m, x: m.a(x + x) * 2, a=nn.Linear(4, 4)), example=(SEVEN,)),
    "average pools of all kinds": Case(model=lambda: Of(pooled, a=nn.Conv2d(3, 4, 3)), example=(image(2, 3, 10, 10),)),
    "cropped by negative padding": Case(
        model=lambda: Of(lambda m, x: m.b(F.pad(m.a(x), (-1, 0, 2, -1))), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 1)),
        example=(image(2, 3, 10, 10),),
    ),
    "padded, then no convolution": Case(
        model=lambda: Of(lambda m, x: torch.sigmoid(F.pad(m.a(x), (1, 1, 2, 0))), a=nn.Conv2d(3, 4, 3)),
        example=(image(2, 3, 10, 10),),
    ),
    "a convolution behind unsqueeze, sizes vary": Case(
        model=lambda: Of(lambda m, x: m.a(x.unsqueeze(1)), a=nn.Conv2d(1, 4, 3)),
        example=(image(2, 8, 8),),
        shapes=(({0: Dim("batch", max=8), 1: Dim("height", min=4, max=12)},),),
    ),
    "an image without a batch": Case(
        model=lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)),
        example=(image(3, 12, 12),),
    ),
}  # fmt: skip


def quantized(case: Case, quantizer):
    torch.manual_seed(0)
    data = [tuple(image(*x.shape, seed=seed) for x in case.example) for seed in range(3)]
    quantizer.set_global("w8a8")
    # numbers at random keep little of their signal, and lose none in a lowering
    return quantize(case.model().eval(), case.example, quantizer, data, dynamic_shapes=case.shapes, min_sqnr_db=None)


def check(program, result, case: Case) -> None:
    """The program was compared with its graph as it was made, also at the ends of its sizes; it is called once more."""
    assert program.verification.passed
    assert program.verification.batches >= 1 + len(case.more) + 2 * (case.shapes is not None)
    for inputs in (case.example, *case.more):
        torch.testing.assert_close(program(*inputs), result(*inputs), atol=0.05, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_executorch(name):
    pytest.importorskip("executorch")
    result = quantized(case := CASES[name], XNNPACKQuantizer())
    check(to_executorch(result, verify_inputs=case.more), result, case)


@pytest.mark.parametrize("name", CASES)
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxruntime")
    result = quantized(case := CASES[name], XNNPACKQuantizer())
    check(to_onnx(result, path=tmp_path / "model.onnx", verify_inputs=case.more), result, case)


ONE_CHANNEL: dict[str, Case] = {
    "of sequences": Case(
        model=lambda: nn.Sequential(nn.Conv1d(1, 3, 10), nn.ReLU()), example=(image(4, 1, 32),), shapes=(BATCH,)
    ),
    "of images": Case(
        model=lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), example=(image(4, 1, 8, 8),), shapes=(BATCH,)
    ),
}


@pytest.mark.inductor
@pytest.mark.parametrize("name", ONE_CHANNEL)
def test_convolutions_over_one_channel_on_inductor(name):
    """An image of one channel is contiguous and in channels last, which Inductor takes for the layout of the result."""
    result = quantized(case := ONE_CHANNEL[name], X86InductorQuantizer())
    program = to_inductor(result)
    (op,) = program.report.ops
    assert op.kernel == "float"
    x = image(7, *case.example[0].shape[1:])
    torch.testing.assert_close(program(x), result(x))


@pytest.mark.inductor
@pytest.mark.slow
def test_a_package_over_one_channel(tmp_path):
    result = quantized(ONE_CHANNEL["of images"], X86InductorQuantizer())
    package = package_inductor(result, path=tmp_path / "model.pt2")
    for x in (image(7, 1, 8, 8), image(7, 8, 8, 1).permute(0, 3, 1, 2), image(1, 1, 8, 8)[:, :, :, :]):
        torch.testing.assert_close(package(x), result(x))


@pytest.mark.parametrize("lower", [to_executorch, to_inductor, to_onnx])
def test_a_model_in_half_precision_is_told_what_to_do(lower, tmp_path):
    rows = image(4, 8).half()
    quantizer = X86InductorQuantizer() if lower is not to_executorch else XNNPACKQuantizer()
    result = quantize(nn.Linear(8, 8).eval().half(), rows, quantizer.set_global("w8a8"), [rows], min_sqnr_db=None)
    path = {"path": tmp_path / "model.onnx"} if lower is to_onnx else {}
    with pytest.raises(LoweringError, match=r"linear.* is float16.*Quantize model\.float\(\) instead"):
        lower(result, **path)


def transposed_linear() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(image(8, 8).t())
    return nn.Sequential(linear, nn.ReLU())


@pytest.mark.inductor
def test_a_weight_that_is_a_transposed_view_on_inductor():
    result = quantized(case := Case(model=transposed_linear, example=(image(4, 8),)), X86InductorQuantizer())
    check(to_inductor(result), result, case)


def test_layouts_do_not_matter():
    """A model and its example in channels last; run on what is not."""
    pytest.importorskip("executorch")
    fmt = torch.channels_last
    case = Case(
        model=lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).to(
            memory_format=fmt
        ),
        example=(image(2, 3, 8, 8).to(memory_format=fmt),),
        more=((image(2, 3, 8, 8),), (image(8, 8, 3, 2).permute(3, 2, 0, 1),)),
    )
    result = quantized(case, XNNPACKQuantizer())
    check(to_executorch(result, verify_inputs=case.more), result, case)
