"""A decoder whose weights do not fit beside their integers: quantized from its files, under a limit on memory.

``python -m benchmarks.larger_than_memory --out benchmarks/results/larger_than_memory`` writes a Llama of random weights
to a temporary folder, as `transformers` would (bfloat16, a shard per layer, an index), captures the graph that takes
one token and quantizes it in a process of its own for each scheme, saves it, and loads it again in another process. By
default it has 17 layers of the width of Llama 2 7B (arXiv:2307.09288), one table for embedding and head, and 3.1
billion parameters.

The limit is ``RLIMIT_DATA``: memory that the process may write, allocated or not. ``RLIMIT_AS`` would also count the
code of libraries and files that are mapped to be read, which the system drops when it needs their place. The peak is
``VmHWM``, what was in memory at one time, code and mapped files included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quant2e
from benchmarks.demo.record import record
from benchmarks.timing import machine
from lowering.language_models import CachedDecoder
from quant2e.annotation.quantizer import Quantizer
from quant2e.weights.short_form import shortened
from quantizers import ComposableQuantizer, EmbeddingQuantizer, X86InductorQuantizer

GIB = 2**30
TOKEN = (torch.tensor([[15]]), torch.tensor([0]))
WORDS = 32_000
SCHEMES: Mapping[str, Callable[[], Quantizer]] = {
    "w8": lambda: ComposableQuantizer([EmbeddingQuantizer(), X86InductorQuantizer().set_global("w8")]),
    "w4-g32": lambda: ComposableQuantizer(
        [EmbeddingQuantizer().set_global("w4-g32"), X86InductorQuantizer().set_global("w4-g32")]
    ),
}
"""How weights are quantized, the embedding table with them."""


def config(width: int, layers: int, words: int) -> Any:
    """A Llama with heads of 128, four queries to a key, and a feed-forward of 8/3 of the width, in steps of 256."""
    from transformers import LlamaConfig

    heads = width // 128
    return LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=-(-width * 8 // 3 // 256) * 256,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        head_dim=128,
        tie_word_embeddings=True,
    )


def empty_model(width: int, layers: int, words: int) -> nn.Module:
    """The model in bfloat16, without weights."""
    from transformers import AutoModelForCausalLM

    with quant2e.parameters_on_meta():
        model: nn.Module = AutoModelForCausalLM.from_config(config(width, layers, words), dtype=torch.bfloat16)
    return model.eval()


def write_checkpoint(model: nn.Module, folder: Path) -> int:
    """Random weights for ``model``, a shard per layer, so that one is in memory at a time; returns their bytes."""
    from safetensors.torch import save_file

    block = torch.empty(1 << 24).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        shards.setdefault(name.partition(".layers.")[2].partition(".")[0] or name, {})[name] = parameter
    listed: dict[str, str] = {}
    total = 0
    for number, parameters in enumerate(shards.values()):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {name: _random(parameter, block, number) for name, parameter in parameters.items()}
        save_file(values, folder / file)
        listed |= dict.fromkeys(values, file)
        total += sum(value.nbytes for value in values.values())
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _random(parameter: Tensor, block: Tensor, layer: int) -> Tensor:
    """Values of a block of normal ones, from another place on in each layer."""
    if parameter.dim() == 1:
        return torch.ones(parameter.shape, dtype=parameter.dtype)
    count = parameter.numel()
    rolled = block.roll(layer * 1_000_003)
    return rolled.repeat(-(-count // len(block)))[:count].reshape(parameter.shape).to(parameter.dtype)


# -------------------------------------------------------------------------------------------- in a process of its own


def status(name: str) -> int:
    """Bytes that ``/proc`` gives for this process: ``VmHWM``, the most that was in memory; ``VmRSS``, what is now."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def held(module: nn.Module) -> int:
    """Bytes of memory of the tensors of a graph, short forms as short as they are."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values()
    places = ((shortened(tensor), tensor) for tensor in tensors)
    return sum(tensor.nbytes if place is None else place.stored.nbytes for place, tensor in places)


def checksum(logits: Tensor) -> str:
    """Of the bits of logits."""
    return hashlib.sha256(logits.float().contiguous().numpy().tobytes()).hexdigest()


def quantize_from(folder: Path, scheme: str, sizes: tuple[int, int, int], save: Path) -> dict[str, Any]:
    """Quantize and save, and say what it took."""
    model = empty_model(*sizes)
    before, began = status("VmRSS"), time.process_time()
    cached = CachedDecoder(quant2e.attach_weights(model, folder), max_length=64).eval()
    quantized = quant2e.quantize(cached, TOKEN, SCHEMES[scheme](), min_sqnr_db=None)
    seconds, peak = time.process_time() - began, status("VmHWM")
    began = time.process_time()
    quantized.save(save)
    saved, peak_saved = time.process_time() - began, status("VmHWM")
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "largest": max(parameter.nbytes for parameter in model.parameters()),
        "before": before,
        "peak": peak,
        "peak_saved": peak_saved,
        "result": held(quantized.module),
        "file": save.stat().st_size,
        "seconds": seconds,
        "seconds_saved": saved,
        "sqnr_db": quantized.report.sqnr_db,
        "logits": checksum(quantized(*TOKEN)),
    }


def load_from(file: Path) -> dict[str, Any]:
    """Load what was saved, and run it."""
    began = time.process_time()
    loaded = quant2e.load(file)
    seconds, peak = time.process_time() - began, status("VmHWM")
    return {"peak_loaded": peak, "seconds_loaded": seconds, "logits": checksum(loaded(*TOKEN))}


def quantize_in_memory(folder: Path, scheme: str) -> dict[str, Any]:
    """The same with the weights in memory, as `transformers` loads them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    quant2e.quantize(CachedDecoder(model, max_length=64).eval(), TOKEN, SCHEMES[scheme](), min_sqnr_db=None)
    return {"peak": status("VmHWM")}


def child(asked: argparse.Namespace) -> None:
    """Set the limit, do one job, and print what it took as JSON."""
    if asked.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(asked.limit * GIB),) * 2)
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    torch.set_num_threads(asked.threads)
    sizes = (asked.width, asked.layers, asked.words)
    file = asked.folder / f"{asked.scheme}.pt2"
    if asked.job == "write":
        found: dict[str, Any] = {"bytes": write_checkpoint(model := empty_model(*sizes), asked.folder)}
        model.config.save_pretrained(asked.folder)  # type: ignore[union-attr,operator]
    elif asked.job == "quantize":
        found = quantize_from(asked.folder, asked.scheme, sizes, file)
    elif asked.job == "load":
        found = load_from(file)
    else:
        found = quantize_in_memory(asked.folder, asked.scheme)
    json.dump(found, sys.stdout)


def start(asked: argparse.Namespace, job: str, folder: Path, scheme: str = "w8") -> dict[str, Any]:
    """Run one job in a process of its own; what it printed, or how it failed."""
    given = {name: getattr(asked, name) for name in ("width", "layers", "words", "limit", "threads")}
    options = [
        f"--{name}={value}" for name, value in (given | {"job": job, "folder": folder, "scheme": scheme}).items()
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.larger_than_memory", *options],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(asked.threads), "QUANT2E_PROGRESS": "0"},
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --------------------------------------------------------------------------------------------------------- the report


def measure(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each scheme, and one for weights in memory; the files are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="larger_than_memory_", dir=asked.scratch) as name:
        folder = Path(name)
        written = start(asked, "write", folder)
        for scheme in asked.schemes:
            row = {"scheme": scheme, "weights": written.get("bytes", 0), **start(asked, "quantize", folder, scheme)}
            if "failed" not in row:
                loaded = start(asked, "load", folder, scheme)
                row |= {"same_logits": loaded.get("logits") == row["logits"], **loaded}
                (folder / f"{scheme}.pt2").unlink()
            yield row
        if asked.in_memory:
            yield {"scheme": "w8, in memory", "weights": written.get("bytes", 0)} | start(asked, "in-memory", folder)


_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "weights": lambda row: row["scheme"],
    "files, bfloat16": lambda row: _gib(row["weights"]),
    "integers": lambda row: _gib(row["result"]),
    "largest float": lambda row: _gib(row["largest"]),
    "before": lambda row: _gib(row["before"]),
    "peak": lambda row: _gib(row["peak"]),
    "peak, saved": lambda row: _gib(row["peak_saved"]),
    "peak, loaded": lambda row: _gib(row["peak_loaded"]),
    "file": lambda row: _gib(row["file"]),
    "file / float32": lambda row: f"{row['file'] / (4 * row['parameters']):.3f}",
    "quantize s": lambda row: f"{row['seconds']:.0f}",
    "save s": lambda row: f"{row['seconds_saved']:.0f}",
    "load s": lambda row: f"{row['seconds_loaded']:.0f}",
    "SQNR dB": lambda row: f"{row['sqnr_db']:.1f}",
    "same logits": lambda row: "yes" if row["same_logits"] else "NO",
}


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row for people; what failed says so in its last cell."""
    line = [give(row) if "failed" not in row else "–" for give in _COLUMNS.values()]
    if "failed" in row:
        line = [row["scheme"], _gib(row["weights"]), *line[2:-1], row["failed"][:120]]
    return line


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--words", type=int, default=WORDS)
    parser.add_argument("--limit", type=float, default=8.0, help="GiB of RLIMIT_DATA; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--scratch", type=Path, help="where the temporary folder is made; it takes 10 GB")
    parser.add_argument("--in-memory", action="store_true", help="also with the weights in memory, under the limit")
    parser.add_argument("--out", type=Path)
    for hidden in ("--job", "--scheme", "--folder"):
        parser.add_argument(hidden, type=Path if hidden == "--folder" else str, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        child(asked)
        return
    rows = []
    for row in measure(asked):
        rows.append(row)
        print(json.dumps(row))
    if asked.out:
        more = f"GiB, and seconds of CPU. The limit is {asked.limit:g} GiB of RLIMIT_DATA."
        record(
            asked.out, "weights larger than memory", machine(), list(_COLUMNS), list(map(cells, rows)),
            data=rows, more=more,
        )  # fmt: skip


if __name__ == "__main__":
    main()
