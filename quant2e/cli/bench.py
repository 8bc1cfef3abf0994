"""``quant2e bench``: program files timed side by side on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from quant2e.cli.inputs.arguments import Existing, NumberList
from quant2e.cli.options import POSITIVE, PROGRAM
from quant2e.cli.targets import looked_up
from quant2e.cli.verb import VerbResult, verb

_EXAMPLE = """
example:
  quant2e bench model_float.pte model_int8.pte --threads 1,2

inputs:
  numpy.savez("x.npz", ids, mask)       # one array per tensor, in the order in which the programs take them
  quant2e bench model_int8.pte model_int8.pt2 --inputs x.npz

A .pte runs in the ExecuTorch runtime, an .onnx in onnxruntime, an .xml in OpenVINO, a .pt2 in eager torch, and a
package of AOTInductor, which is native code, as it is: time those that you trust as you trust a program. Without
--inputs all run on the same: what a .pt2 was exported with, or noise of sizes that all take. Programs are called in
turn, so that a machine that slows down slows all of them; times are medians, and ratios are to the first program: above
1 is faster.
Each program runs in a process of its own, which a file that crashes its runtime ends.
"""


@verb("bench", example=_EXAMPLE)
@click.argument("programs", nargs=-1, required=True, type=PROGRAM, metavar="PROGRAM...")
@click.option("--inputs", type=Existing(".npz"), help="Arrays to run on (default: a file's own, or noise).")
@click.option(
    "--threads", type=NumberList(whole=True), default="1", show_default=True, metavar="N,…", help="Numbers of threads."
)
@click.option("--rounds", type=POSITIVE, metavar="N", help="Calls of each program (default: about 2 s, 9 to 200).")
@click.option("--method", metavar="NAME", help='Of .pte files: the method to run (default: "forward").')
def bench_files(
    programs: tuple[Path, ...], inputs: Path | None, threads: tuple[int, ...], rounds: int | None, method: str | None
) -> VerbResult:
    """Time programs side by side on this machine."""
    bench, table = (looked_up(f"lowering.bench.command:{name}") for name in ("bench", "table"))
    rows = bench(list(programs), inputs=inputs, threads=list(threads), rounds=rounds, method=method)
    for row in rows:
        if not row.footprint.unchanged:
            said = f"note: {row.path} carries no checksum of quant2e, so nothing tells whether it is as it was written"
            click.echo(said, err=True)
    return VerbResult(text=table(rows), data={"programs": [row.as_dict() for row in rows]})
