"""Scikit-learn's handwritten digits, and a small residual network with batch norm and depthwise layers, trained on
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowering
from benchmarks.demo.outcome import Bound, Int8, Outcome
from benchmarks.demo.pipeline import Call, Case, Target, run_targets, save_float
from benchmarks.demo.progress import Advance, Phases, silent
from quantizers import (
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)

HELD_OUT = 597
"""Of the 1,797 images, this many are never trained or calibrated on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Images float32 [n, 1, 8, 8] in 0..1 and labels int64 [n]; the two sets are disjoint and equally balanced."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(held_out: int = HELD_OUT) -> Digits:
    """Read the images that scikit-learn ships and split them, always in the same way."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=held_out, random_state=0, stratify=labels)
    return Digits(
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
    )


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """Two dense 3×3 convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(width, width, 3), nn.ReLU(), *_conv(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        """[n, width, h, w] to the same shape."""
        return F.relu(self.body(x) + x)


class InvertedResidual(nn.Module):
    """Widen by 1×1, depthwise 3×3, narrow by 1×1; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, expand: int = 3) -> None:
        super().__init__()
        wide = inputs * expand
        self.body = nn.Sequential(
            *_conv(inputs, wide, 1),
            nn.ReLU6(),
            *_conv(wide, wide, 3, stride=stride, groups=wide),
            nn.ReLU6(),
            *_conv(wide, outputs, 1),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        return self.body(x) + x if self.shortcut else self.body(x)


class DigitsNet(nn.Module):
    """8×8 grey images to ten logits: a stem, residual and inverted residual blocks, average pooling, one linear
    layer.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv(1, width, 3),
            nn.ReLU(),
            Residual(width),
            InvertedResidual(width, 2 * width, stride=2),
            InvertedResidual(2 * width, 2 * width),
            Residual(2 * width),
        )
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """[n, 1, 8, 8] to logits [n, 10]."""
        x = F.adaptive_avg_pool2d(self.features(images), 1)
        return self.classifier(torch.flatten(x, 1))


def shifted(images: Tensor) -> Tensor:
    """Move each image by −1, 0 or 1 pixel along each axis; what enters is background."""
    padded = F.pad(images, (1, 1, 1, 1))
    rows, columns = (torch.randint(0, 3, (len(images), 1)) + torch.arange(8) for _ in range(2))
    each = torch.arange(len(images))[:, None, None]
    return padded[each, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def train(
    digits: Digits, *, epochs: int = 24, seed: int = 0, progress: Callable[[int, float], None] | None = None
) -> DigitsNet:
    """Train a `DigitsNet` and return it in eval mode; about a second per epoch on two cores.

    ``progress(epoch, loss)`` is called after each epoch. The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
        batch = 64
        steps = len(digits.train_labels) // batch
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs * steps)
        for epoch in range(epochs):
            order = torch.randperm(len(digits.train_labels))[: steps * batch].view(steps, batch)
            total = 0.0
            for chosen in order:
                logits = model(shifted(digits.train_images[chosen]))
                loss = F.cross_entropy(logits, digits.train_labels[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
            if progress is not None:
                progress(epoch, total / steps)
    return model.eval()


def top1(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, size: int = 64) -> float:
    """Share of images whose largest logit is the label's."""
    with torch.no_grad():
        predicted = torch.cat([model(batch).argmax(dim=1) for batch in images.split(size)])
    return (predicted == labels).double().mean().item()


def _targets() -> tuple[Target, ...]:
    return (
        Target(
            runtime="Inductor",
            lower=lowering.to_inductor,
            quantizers={
                "static": lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
            },
        ),
        Target(
            runtime="ExecuTorch",
            lower=lowering.to_executorch,
            quantizers={
                "static": lambda: XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
            },
        ),
    )


def _bounds(int8: Sequence[Int8], float_top1: float) -> tuple[Bound, ...]:
    found = []
    for row in int8:
        for place, measures in ((f"the Q/DQ graph for {row.runtime}", row.qdq), (row.runtime, row.lowered)):
            what = f"difference of top-1 from float in points (digits, {place})"
            points = 100 * abs(measures["top1"] - float_top1)
            found.append(Bound(what=what, value=points, limit=0.5, at_least=False))
        if row.runtime == "ExecuTorch":
            what = f"largest difference from the Q/DQ graph in {row.step_rule} (digits, ExecuTorch)"
            found.append(Bound(what=what, value=row.max_steps, limit=1.0, at_least=False))
    return tuple(found)


def run(folder: Path, phases: Phases) -> Outcome:
    """Train the network, quantize it for both runtimes, write the files to ``folder`` and return everything
    measured.
    """
    epochs = 24
    digits = load()
    with phases.phase(f"digits: train {epochs} epochs on {len(digits.train_labels)} images") as advance:
        model = train(digits, epochs=epochs, progress=lambda epoch, _: advance(epoch + 1, epochs))

    def measure(call: Call, _: Advance) -> dict[str, float]:
        return {"top1": top1(call, digits.test_images, digits.test_labels)}

    batch = torch.export.Dim("batch", min=1, max=64)
    case = Case(
        name="digits",
        model=model,
        example_inputs=(digits.train_images[:16],),
        dynamic_shapes=({0: batch},),
        calibration=[(images,) for images in digits.train_images[:512].split(32)],
        held_out=[(images,) for images in digits.test_images[:256].split(64)],
        measure=measure,
        score=lambda call: top1(call, digits.train_images[512:], digits.train_labels[512:]),
        workloads={"1 image": (digits.test_images[:1],), "64 images": (digits.test_images[:64],)},
    )
    with phases.phase("digits: save the float model"):
        float_bytes = save_float(case, folder)
        measures = measure(model, silent)
    int8 = run_targets(case, _targets(), folder, phases)
    return Outcome(
        name="digits",
        title="Image classification: residual CNN with batch norm and depthwise layers on scikit-learn's digits",
        data=(
            f"trained on {len(digits.train_labels)} images, calibrated on 512 of them, "
            f"evaluated on {len(digits.test_labels)} held-out images"
        ),
        measures=measures,
        float_bytes=float_bytes,
        int8=int8,
        bounds=_bounds(int8, measures["top1"]),
    )
