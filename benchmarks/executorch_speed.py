"""Programs for ExecuTorch, timed side by side: float, ExecuTorch's own int8 flow, ours.

``python -m benchmarks.executorch_speed`` writes one table per model, scheme and batch size. All programs of a table are
called in turn in one process, with the number of threads set before they are loaded; times are medians, ratios are to
ExecuTorch's own int8 program (above 1: ours is faster). Beside them: signal to noise against the float program, so that
a fast wrong program is seen, size, load time and memory. ``--out`` keeps the programs, and a second run times those.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.partitions import SMALL, full, schemes
from benchmarks.programs import ours, theirs
from benchmarks.shapes import SHAPES
from benchmarks.timing import machine
from lowering.bench.command import bench, table
from lowering.files import open_program
from quant2e.files import atomic_file

LABELS = ("executorch_int8", "quant2e_int8", "float")


def programs(name: str, scheme: str, batch: int, folder: Path, *, small: bool) -> list[Path]:
    """The program files of one table; those that exist are kept."""
    stem = f"{name.replace('/', '')}_{scheme}_b{batch}{'_small' if small else ''}"
    paths = [folder / f"{stem}_{label}.pte" for label in LABELS]
    if all(path.exists() for path in paths):
        return paths
    torch.manual_seed(0)
    model, inputs = (SMALL[name] if small else full(name))()
    inputs = tuple(x.repeat(batch, *[1] * (x.dim() - 1)) for x in inputs)
    flows = (theirs(model, inputs, scheme), ours(model, inputs, scheme), ours(model, inputs, "float"))
    for path, program in zip(paths, flows, strict=True):
        with atomic_file(path) as part:
            part.write_bytes(program.buffer)
    return paths


def signal_to_noise(paths: list[Path]) -> dict[str, float]:
    """SQNR of each program's first output against the last one's, the float program's, in dB, on noise."""
    opened = [open_program(path, isolated=False) for path in paths]
    outputs = [one.run(opened[0].tensors())[0].double() for one in opened]
    power = outputs[-1].square().sum()
    return {
        path.name: float(10 * torch.log10(power / (out - outputs[-1]).square().sum()))
        for path, out in zip(paths[:-1], outputs[:-1], strict=True)
    }


def main() -> None:
    """Lower what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("executorch_programs"))
    chosen: Any = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    chosen.out.mkdir(parents=True, exist_ok=True)
    print(machine())
    for name in chosen.models:
        for scheme in schemes(name):
            for batch in chosen.batches:
                paths = programs(name, scheme, batch, chosen.out, small=chosen.small)
                print(f"\n{name}, {scheme}, batch {batch}")
                print(table(bench(paths, threads=chosen.threads, rounds=chosen.rounds)))
                for program, decibels in signal_to_noise(paths).items():
                    print(f"  {program}: {decibels:.1f} dB against float")


if __name__ == "__main__":
    main()
