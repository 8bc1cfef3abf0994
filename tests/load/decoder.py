"""Quantizes a decoder of random weights in a process of its own and prints what memory it took, as JSON.

``python -m tests.load.decoder --layers 15 --width 2048 --setting x86-w8``: bytes of the float weights, resident bytes
before the model was made, with it, at the peak, and at the end. ``--files FOLDER``: the weights stay in files there,
which a process before wrote with ``--write``.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quant2e
from quant2e.annotation.quantizer import Quantizer
from quantizers import X86InductorQuantizer, XNNPACKQuantizer
from tests.quant2e.weights.checkpoints import write_safetensors

WORDS = 8192


class Layer(nn.Module):
    """Attention to the past and a gated feed-forward, as in Llama (arXiv:2302.13971), without its rotations."""

    def __init__(self, width: int, heads: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 4 * width, bias=False), nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        n = self.norm1(x)
        q, k, v = (one(n).view(batch, length, self.heads, -1).transpose(1, 2) for one in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        n = self.norm2(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class Decoder(nn.Module):
    """Tokens in, logits out: of 15 layers of width 2048, 1.04 B parameters."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


SETTINGS = {
    "x86-w8": lambda: X86InductorQuantizer().set_global("w8"),
    "xnnpack-dynamic": lambda: XNNPACKQuantizer().set_global("w8a8-dynamic"),
}


def resident() -> int:
    """Bytes of this process that are in memory, from ``/proc``."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most that there ever were."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_weights(model: Decoder, folder: Path) -> None:
    """Random weights for ``model``, which has none, a file for each layer."""
    for number, layer in enumerate((*model.layers, None)):
        if layer is None:
            named = {name: p for name, p in model.named_parameters() if not name.startswith("layers.")}
        else:
            named = {f"layers.{number}.{name}": p for name, p in layer.named_parameters()}
        values = {name: torch.empty(p.shape).uniform_(-1, 1) * p.shape[-1] ** -0.5 for name, p in named.items()}
        write_safetensors(folder / f"{number}.safetensors", values)


def empty_model(layers: int, width: int) -> Decoder:
    """Without weights."""
    with quant2e.parameters_on_meta():
        return Decoder(layers, width).eval()


def made_model(layers: int, width: int, files: Path | None) -> Decoder:
    """In memory, or with its weights in files."""
    if files is None:
        return Decoder(layers, width).eval()
    return quant2e.attach_weights(empty_model(layers, width), files)


def run(quantizer: Quantizer, layers: int, width: int, save: Path | None, files: Path | None) -> dict[str, float]:
    """Quantize, and measure."""
    torch.manual_seed(0)
    tokens = torch.randint(WORDS, (1, 4))
    small = Decoder(1, 64).eval()
    quant2e.quantize(small, (tokens,), quantizer)  # what imports and first calls take is nobody's weights
    before = resident()
    model = made_model(layers, width, files)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    made, processor = resident(), time.process_time()
    peak_before = peak()
    result = quant2e.quantize(model, (tokens,), quantizer)
    seconds, most = time.process_time() - processor, peak()
    after = resident()
    if save is not None:
        result.save(save)
    return {
        "weights": weights,
        "before": before,
        "largest": max(p.numel() * p.element_size() for p in model.parameters()),
        "made": made,
        "peak_before": peak_before,
        "peak": most,
        "after": after,
        "peak_saved": peak(),
        "quantized": float(result.report.quantized_bytes or 0),
        "sqnr_db": float(result.report.sqnr_db or 0.0),
        "seconds": seconds,
    }


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.decoder", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--setting", choices=SETTINGS, default="x86-w8")
    parser.add_argument("--save", type=Path, help="save the result there, and measure that as well")
    parser.add_argument("--files", type=Path, help="keep the weights in files there")
    parser.add_argument("--write", action="store_true", help="write these files, and do nothing else")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.write:
        write_weights(empty_model(asked.layers, asked.width), asked.files)
        json.dump({}, sys.stdout)
        return
    json.dump(run(SETTINGS[asked.setting](), asked.layers, asked.width, asked.save, asked.files), sys.stdout)


if __name__ == "__main__":
    main()
