"""One model through the whole flow, for every runtime: quantize, choose, save, reload, lower, measure.

In: a `Case` (a model and what to measure on it) and `Target`s. Out: an `Outcome`, and files in a folder. Everything
here is public interface: what this script does, a user's script can do.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowering
import quant2e
from benchmarks.demo.outcome import Int8
from benchmarks.demo.progress import Advance, Phases
from benchmarks.timing import Latency, compare
from quant2e.files import write_text

Call = Callable[..., torch.Tensor]
Measures = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and what to measure on it.

    ``measure(call, advance)`` runs any callable with the model's signature on the evaluation data. ``score`` does so on
    data that is neither evaluated nor calibrated on, to choose a scheme: larger is better. ``held_out``: batches for
    the comparison of a program with its graph. ``workloads``: inputs to time, by a name that says their size.
    """

    name: str
    model: nn.Module
    example_inputs: tuple[torch.Tensor, ...]
    dynamic_shapes: Any
    calibration: Sequence[tuple[torch.Tensor, ...]]
    held_out: Sequence[tuple[torch.Tensor, ...]]
    measure: Callable[[Call, Advance], Measures]
    score: Callable[[Call], float]
    workloads: Mapping[str, tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A runtime: how to lower to it, and a quantizer per scheme ("static", "dynamic") worth trying for it."""

    runtime: str
    lower: Callable[..., Any]
    quantizers: Mapping[str, Callable[[], Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A quantized model and the score of its Q/DQ graph."""

    scheme: str
    result: quant2e.QuantizedModel
    score: float


def save_float(case: Case, folder: Path) -> int:
    """Export the float model with plain ``torch.export`` and save it, for its size in bytes."""
    path = folder / f"{case.name}_float.pt2"
    program = torch.export.export(case.model, case.example_inputs, dynamic_shapes=case.dynamic_shapes)
    torch.export.save(program, path)
    return path.stat().st_size


def candidates(case: Case, target: Target, phases: Phases) -> list[Candidate]:
    """Quantize by each scheme of ``target`` and score the Q/DQ graphs; the best first."""
    found = []
    for scheme, quantizer in target.quantizers.items():
        with phases.phase(f"{case.name}: quantize for {target.runtime}, {scheme}") as advance:
            result = quant2e.quantize(
                case.model,
                case.example_inputs,
                quantizer(),
                case.calibration,
                dynamic_shapes=case.dynamic_shapes,
                progress=advance,
                min_sqnr_db=None,  # a scheme that loses the signal is a candidate that does not win
            )
            found.append(Candidate(scheme=scheme, result=result, score=case.score(result)))
    return sorted(found, key=lambda candidate: -candidate.score)


def save_and_reload(candidate: Candidate, case: Case, path: Path) -> int:
    """Save the Q/DQ graph, read it back and compare outputs bit for bit; return the size of the file in bytes.

    Raises `RuntimeError` when the file does not give back what was saved.
    """
    candidate.result.save(path)
    again = quant2e.load(path)
    with torch.no_grad():
        for batch in case.held_out:
            if not torch.equal(again(*batch), candidate.result(*batch)):
                raise RuntimeError(f"{path} was saved and loaded, and its outputs are not those of the saved model")
    return path.stat().st_size


def run_targets(case: Case, targets: Sequence[Target], folder: Path, phases: Phases) -> tuple[Int8, ...]:
    """Take ``case`` to every runtime that this machine can lower to; say which it cannot, and why."""
    found = []
    for target in targets:
        if target.runtime == "Inductor" and not _has_compiler():
            reason = "Inductor generates C++, and there is no C++ compiler here: install g++ or clang++, or set CXX"
            phases.console.print(f"{case.name}: {target.runtime} skipped. {reason}", highlight=False, soft_wrap=True)
            continue
        found.append(run_target(case, target, folder, phases))
    return tuple(found)


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


def run_target(case: Case, target: Target, folder: Path, phases: Phases) -> Int8:
    """Take ``case`` to one runtime with the better scheme, and measure it there against float."""
    tried = candidates(case, target, phases)
    best = tried[0]
    stem = f"{case.name}_{target.runtime.lower()}"
    with phases.phase(f"{case.name}: measure the {best.scheme} Q/DQ graph for {target.runtime}") as advance:
        qdq = case.measure(best.result, advance)
    with phases.phase(f"{case.name}: save and reload for {target.runtime}"):
        pt2_bytes = save_and_reload(best, case, folder / f"{stem}_int8.pt2")
    with phases.phase(f"{case.name}: lower int8 to {target.runtime}"):
        program = target.lower(best.result, case.example_inputs, dynamic_shapes=case.dynamic_shapes)
    with phases.phase(f"{case.name}: lower float to {target.runtime}, for comparison"):
        float_graph = quant2e.capture(case.model, case.example_inputs, dynamic_shapes=case.dynamic_shapes)
        float_program = target.lower(float_graph, case.example_inputs, dynamic_shapes=case.dynamic_shapes)
    sizes = _save_program(program, folder / f"{stem}_int8.pte"), _size(float_program)
    with phases.phase(f"{case.name}: measure int8 on {target.runtime}") as advance:
        lowered = case.measure(program, advance)
    with phases.phase(f"{case.name}: compare {target.runtime} with the Q/DQ graph"):
        check = lowering.verify(program, best.result, case.held_out)
    report = f"{case.name} on {target.runtime}, {best.scheme}\n\n{best.result.report}\n\n{program.report}\n\n{check}\n"
    write_text(folder / f"{stem}_int8.report.txt", report)
    latencies = []
    for what, inputs in case.workloads.items():
        with phases.phase(f"{case.name}: time {what} on {target.runtime}"):
            latencies.append(_time(float_program, program, inputs, target.runtime, what))
    return Int8(
        runtime=target.runtime,
        scheme=best.scheme,
        scores={candidate.scheme: candidate.score for candidate in tried},
        qdq=qdq,
        lowered=lowered,
        max_steps=check.max_steps,
        sqnr_db=check.sqnr_db,
        step_rule=check.step_rule,
        int8_mac_share=best.result.report.int8_mac_share,
        pt2_bytes=pt2_bytes,
        program_bytes=sizes[0],
        float_program_bytes=sizes[1],
        latencies=tuple(latencies),
    )


def _save_program(program: Any, path: Path) -> int | None:
    if not isinstance(program, lowering.ExecuTorchProgram):
        return None  # what Inductor compiles stays in memory: packaging would compile it once more
    program.save(path)
    return path.stat().st_size


def _size(program: Any) -> int | None:
    return len(program.buffer) if hasattr(program, "buffer") else None


def _time(float_call: Call, int8_call: Call, inputs: tuple[torch.Tensor, ...], runtime: str, what: str) -> Latency:
    with torch.no_grad():
        return compare(lambda: float_call(*inputs), lambda: int8_call(*inputs), runtime=runtime, what=what)
