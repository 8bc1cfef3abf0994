"""Ops that move values between two convolutions: annotated where the delegate has them, in float with a reason else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant2e import capture
from quant2e.annotation.specs import ANNOTATION
from quant2e.graph.fake_values import is_float
from quantizers import XNNPACKQuantizer
from quantizers.xnnpack import get_symmetric_quantization_config

aten = torch.ops.aten
IMAGE = torch.randn(1, 4, 6, 6)


class Between(nn.Module):
    def __init__(self, move):
        super().__init__()
        self.a, self.b, self.move = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), move
        self.register_buffer("order", torch.tensor([3, 0, 1]))

    def forward(self, x):
        parts = self.move(self, self.a(x))
        parts = parts if isinstance(parts, list | tuple) else [parts]
        return [self.b(part.reshape(1, 4, -1, 1)) for part in parts]


INSIDE = {
    "detach": lambda m, x: x.detach(),
    "flatten": lambda m, x: x.flatten(2),
    "transpose": lambda m, x: x.transpose(2, 3),
    "pixel_shuffle": lambda m, x: F.pixel_shuffle(x, 2),
    "channel_shuffle": lambda m, x: F.channel_shuffle(x, 2),
    "native_channel_shuffle": lambda m, x: aten.native_channel_shuffle(x, 2),
    "slice": lambda m, x: x[:, :, 1:4],
    "select": lambda m, x: x[:, :, 1],
    "select_copy": lambda m, x: aten.select_copy.int(x, 2, 1),
    "split": lambda m, x: x.split(3, 2),
    "unbind": lambda m, x: x[:, :, :2].unbind(2),
    "unsafe_chunk": lambda m, x: x.unsafe_chunk(2, 2),
    "zeros": lambda m, x: F.pad(x, (1, 1), value=0.0),
    "step": lambda m, x: x[:, :, ::2],
    "flip": lambda m, x: x.flip(2, 3),
    "fliplr": lambda m, x: x.fliplr(),
    "roll": lambda m, x: x.roll(1, 2),
    "fftshift": lambda m, x: torch.fft.fftshift(x, dim=(2,)),
    "index_select": lambda m, x: x.index_select(2, m.order),
    "index": lambda m, x: x[:, :, m.order],
    "gather": lambda m, x: x.gather(3, m.order.expand(1, 4, 6, 3)),
    "expand": lambda m, x: x[:, :, :1].expand(1, 4, 6, 6),
    "expand_as": lambda m, x: x[:, :, :1].expand_as(x),
    "repeat": lambda m, x: x.repeat(1, 1, 2, 1),
    "tile": lambda m, x: x.tile(2),
    "repeat_interleave": lambda m, x: x.repeat_interleave(2, 2),
    "nearest": lambda m, x: F.interpolate(x, scale_factor=2),
    "nearest, by no whole factor": lambda m, x: F.interpolate(x, size=(7, 9)),
    "nearest of a sequence": lambda m, x: F.interpolate(x.flatten(2), scale_factor=2),
    "reflect": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "replicate": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "circular": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="circular"),
}
"""One delegate with the convolutions around them: `tests/lowering/executorch/xnnpack/test_slicing.py`."""

OUTSIDE = {
    "diagonal": (lambda m, x: x.diagonal(0, 2, 3), "it has fewer axes than its operand"),
    "unfold": (lambda m, x: x.unfold(2, 3, 1), "what it takes along one axis depends on another"),
    "im2col": (lambda m, x: F.unfold(x, 3), "it has fewer axes than its operand"),
    "roll of all": (lambda m, x: x.roll(5), "what it takes along one axis depends on another"),
    "rot90": (lambda m, x: x.rot90(1, (2, 3)), "what it takes along one axis depends on another"),
    "several indices": (lambda m, x: x[:, :, [0, 2], [1, 3]], "it has fewer axes than its operand"),
    "an index that is no constant": (lambda m, x: x[:, :, x[0, 0, 0].int().clamp(0, 5)], "is not constant"),
    "as_strided": (lambda m, x: x.as_strided((1, 4, 3, 3), (144, 36, 6, 1)), "how its operand lies in memory"),
    "tril": (lambda m, x: x.tril(), "XNNPACK has no kernel for it"),
    "many slices": (lambda m, x: F.pad(x, (0, 31)).flip(3), "it takes 39 slices and concatenations"),
}


def quantizer():
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def annotated(model, x=IMAGE, **options):
    """The moves between the convolutions, in order, each with whether it is annotated and why not."""
    own = quantizer()
    gm = own.annotate(own.transform_for_annotation(capture(model.eval(), (x,), **options)))
    calls = [node for node in gm.graph.nodes if node.op == "call_function" and is_float(node)]
    first, last = (place for place, node in enumerate(calls) if node.target is aten.conv2d.default)
    return {node.name: (ANNOTATION in node.meta, own.reason(node)) for node in calls[first + 1 : last]}


@pytest.mark.parametrize("name", [name for name in INSIDE if name not in ("split", "unbind", "unsafe_chunk")])
def test_what_the_delegate_moves_is_annotated(name):
    assert {on for on, _ in annotated(Between(INSIDE[name])).values()} == {True}


@pytest.mark.parametrize("name", ["split", "unbind", "unsafe_chunk"])
def test_tensors_picked_from_a_split_are_annotated(name):
    own = quantizer()
    gm = own.annotate(own.transform_for_annotation(capture(Between(INSIDE[name]).eval(), (IMAGE,))))
    parts = [node for node in gm.graph.nodes if getattr(node.target, "__name__", "") == "getitem"]
    assert parts
    assert all(ANNOTATION in part.meta for part in parts)


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_the_delegate_would_be_split_by_stays_float_and_says_why(name):
    move, why = OUTSIDE[name]
    verdicts = annotated(Between(move))
    assert any(not on and why in reason for on, reason in verdicts.values()), verdicts


def test_slices_of_sizes_that_vary_stay_float():
    batch = {0: torch.export.Dim("batch", max=8)}
    (verdict,) = (
        v
        for name, v in annotated(Sliced().eval(), IMAGE.repeat(3, 1, 1, 1), dynamic_shapes=(batch,)).items()
        if "slice" in name
    )
    assert verdict == (False, "rule 'moves': XNNPACK slices tensors of fixed sizes only")


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.b(self.a(x)[:, :, :2])
