"""One token of a decoder, weight-only: float, 8 bits and 4 bits in groups of 32, through Inductor, side by side.

``python -m benchmarks.weight_only`` prints one row per model, number of tokens and number of threads. The model is a
decoder of `transformers` with random weights, all of its linear layers quantized; the programs are called in turn.
Times are medians in milliseconds; the limit is how long this machine takes to read the weights once, at the speed at
which it sums up a float tensor of 256 MiB. ``--out`` also writes the table as Markdown and JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import lowering
import quant2e
from benchmarks.demo.record import record
from benchmarks.timing import machine
from quant2e.accuracy.output_error import output_sqnr
from quantizers import X86InductorQuantizer

SCHEMES = ("w8", "w4-g32")
BYTES = {"float": 4.0, "w8": 1.0, "w4-g32": 0.5 + 4 / 32}
SIZES = {"small": (512, 4, 1408), "medium": (1024, 12, 2816)}


class Decoder(nn.Module):
    """Logits of a decoder for the tokens given, without a cache."""

    def __init__(self, hidden: int, layers: int, inner: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config).eval()

    def forward(self, ids: Tensor) -> Tensor:
        """``ids``: int64 ``[1, tokens]``; returns float32 ``[1, tokens, 4096]``."""
        logits: Tensor = self.model(ids).logits
        return logits


def bandwidth() -> float:
    """Bytes per second of reading memory, on as many threads as torch uses."""
    block = torch.ones(1 << 26)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best


def medians(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, called in turn, after two rounds that do not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number > 1:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def measure(size: str, tokens: int, threads: int, rounds: int) -> dict[str, str]:
    """One row."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = Decoder(*SIZES[size]).eval()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    ids = torch.randint(0, 4096, (1, tokens))
    captured = quant2e.capture(model, (ids,))
    programs: dict[str, Any] = {"float": lowering.to_inductor(captured, (ids,))}
    noise = {}
    for scheme in SCHEMES:
        result = quant2e.quantize(captured, (ids,), X86InductorQuantizer().set_global(scheme))
        programs[scheme] = lowering.to_inductor(result)
        noise[scheme] = output_sqnr(programs["float"], programs[scheme], [ids])
    seconds = medians({name: partial(program, ids) for name, program in programs.items()}, rounds)
    speed = bandwidth()
    row = {"model": f"{size}, {weights / 1e6:.0f} M weights", "tokens": str(tokens), "threads": str(threads)}
    for name, value in seconds.items():
        row[f"{name} ms"] = f"{value * 1e3:.2f}"
        row[f"{name} limit"] = f"{weights * BYTES[name] / speed * 1e3:.2f}"
    for scheme in SCHEMES:
        row[f"float / {scheme}"] = f"{seconds['float'] / seconds[scheme]:.2f}"
        row[f"{scheme} dB"] = f"{noise[scheme]:.1f}"
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    console = Console(width=200)
    console.print(str(machine()))
    rows = []
    for size in chosen.sizes:
        for tokens in chosen.tokens:
            for threads in chosen.threads:
                rows.append(measure(size, tokens, threads, chosen.rounds))
                console.print(" | ".join(f"{key} {value}" for key, value in rows[-1].items()))
    if chosen.out:
        lines = [list(row.values()) for row in rows]
        record(chosen.out, "one token of a decoder, weight-only, through Inductor", machine(), list(rows[0]), lines)


if __name__ == "__main__":
    main()
