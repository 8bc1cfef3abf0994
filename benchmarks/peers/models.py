"""The models that engines are compared on, and what they are calibrated and run on: the same files for every engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import quant2e
from benchmarks.demo import topics
from benchmarks.peers.worker import ONNX, TRANSFORMERS, Job, arrays, calibration
from benchmarks.shapes import SHAPES
from quant2e.files import atomic_file, write_text
from quant2e.report.macs import count_macs

MINILM = "MiniLM"
MODELS = ("ResNet-18", "MobileNetV2", "MobileNetV3", "BERT-base", MINILM)
"""By name: random weights, but for MiniLM."""

CALIBRATION_BATCHES = 8
_STATE, _MACS = "state.pt", "macs.txt"
Inputs = tuple[Tensor, ...]


class _Whole(nn.Module):
    """A network as an attribute: ExecuTorch cannot fuse batch norms whose names begin with a digit."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == MINILM:
        from benchmarks.demo.minilm import SentenceEmbedder, model_folder

        return SentenceEmbedder(model_folder()).eval()
    made = SHAPES[name][0]()
    return made if name in TRANSFORMERS else _Whole(made).eval()


def _settle(model: nn.Module, batches: Sequence[Inputs]) -> bool:
    """Give batch norms the statistics of data, or random weights would let every signal fade; whether there are any."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for batch in batches if norms else ():
        model(*batch)
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()
    return bool(norms)


def model_of(job: Job) -> nn.Module:
    """The float model, the same in every process."""
    model = _made(job.model)
    if (job.place / _STATE).exists():
        model.load_state_dict(torch.load(job.place / _STATE, weights_only=True))
    return model


def batches_of(name: str, batch: int) -> list[Inputs]:
    """One batch to run, and behind it those to calibrate on: random numbers, or for MiniLM paragraphs of 128 tokens."""
    torch.manual_seed(1)
    if name != MINILM:
        return [SHAPES[name][1](batch) for _ in range(1 + CALIBRATION_BATCHES)]
    from transformers import AutoTokenizer

    from benchmarks.demo.minilm import MAX_TOKENS, model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    texts = topics.load()
    chosen = [sorted(part, key=len)[-batch:] for part in (texts.corpus,)]
    chosen += [list(texts.calibration[start::CALIBRATION_BATCHES][:batch]) for start in range(CALIBRATION_BATCHES)]
    made: list[Inputs] = []
    for part in chosen:
        encoded = tokenizer(part, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        made.append((encoded["input_ids"], encoded["attention_mask"]))
    return made


def macs_of(folder: Path) -> int:
    """Multiply-accumulates of one call, of a model whose data is written."""
    return int((folder / _MACS).read_text())


def write(job: Job) -> None:
    """Write the data, the float model where it depends on data, its output, and how much there is to compute."""
    for place, tensors in enumerate(batches_of(job.model, job.batch)):
        name = "inputs.npz" if place == 0 else f"calibration_{place}.npz"
        with atomic_file(job.place / name) as part:
            np.savez(part, *[tensor.numpy() for tensor in tensors])
    with torch.no_grad():
        model = _made(job.model)
        if _settle(model, calibration_of(job.place)):
            with atomic_file(job.place / _STATE) as part:
                torch.save(model.state_dict(), part)
        with atomic_file(job.place / "reference.npy") as part:
            np.save(part, model(*inputs_of(job.place)).numpy())
        graph = quant2e.capture(model, inputs_of(job.place))
        write_text(job.place / _MACS, str(sum(count_macs(node) for node in graph.graph.nodes)))


def export(job: Job) -> float:
    """Write the float model as ONNX, as torch exports it; returns the seconds that took."""
    model, inputs = model_of(job), inputs_of(job.place)
    start = time.perf_counter()
    with torch.no_grad():
        torch.onnx.export(model, inputs, job.place / ONNX, dynamo=True, external_data=False, verbose=False)
    return time.perf_counter() - start


def inputs_of(folder: Path) -> Inputs:
    """The batch to run."""
    return tuple(map(torch.from_numpy, arrays(folder / "inputs.npz")))


def calibration_of(folder: Path) -> list[Inputs]:
    """The batches to calibrate on."""
    return [tuple(map(torch.from_numpy, batch)) for batch in calibration(folder)]
