"""Targets: for each runtime its quantizer, the function that lowers to it, and the kind of file that it reads."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """``summary``: what runs it. ``quantizer``: ``module:class``, made without arguments, and configured by the name
    of a recipe. ``lower``: ``module:function``, of the quantized model. ``suffix``: of the program file; ``beside``: of
    a second one with the same name, if there is one. ``writes``: the function writes the file itself, to ``path=``;
    otherwise what it returns is saved. ``extra``: what is to be installed. ``knows_isa``: the quantizer takes an
    instruction set.
    """

    summary: str
    quantizer: str
    lower: str
    suffix: str
    beside: str = ""
    writes: bool = False
    extra: str = ""
    knows_isa: bool = False


TARGETS: Mapping[str, Target] = {
    "xnnpack": Target(
        summary="ExecuTorch with XNNPACK, on phones and small computers",
        quantizer="quantizers:XNNPACKQuantizer",
        lower="lowering:to_executorch",
        suffix=".pte",
        extra="executorch",
    ),
    "x86": Target(
        summary="Inductor on x86 CPUs, as a package that needs torch alone",
        quantizer="quantizers:X86InductorQuantizer",
        knows_isa=True,
        lower="lowering:package_inductor",
        suffix=".pt2",
        writes=True,
    ),
    "onnx": Target(
        summary="onnxruntime, on CPUs",
        quantizer="quantizers:X86InductorQuantizer",
        knows_isa=True,
        lower="lowering:to_onnx",
        suffix=".onnx",
        writes=True,
        extra="onnx",
    ),
    "openvino": Target(
        summary="OpenVINO, on CPUs",
        quantizer="quantizers:OpenVINOQuantizer",
        knows_isa=True,
        lower="lowering:to_openvino",
        suffix=".xml",
        beside=".bin",
        extra="openvino",
    ),
}
"""A new target is one entry here."""

ISAS = ("avx2", "avx2_vnni", "avx512", "avx512_vnni", "amx")
"""Names of `quant2e.cpu.TARGETS`, which imports torch."""

DEFAULT_RECIPE = "w8a8"

RECIPES = (".yaml", ".yml", ".json")
"""Suffixes of recipes that are files; others are names."""


def looked_up(place: str) -> Any:
    """The object at ``module:name``, of a package that this one never imports otherwise."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def check_isa(target: str, isa: str | None) -> None:
    """Raise a usage error for an instruction set, where the quantizer of the target takes none."""
    if isa is not None and not TARGETS[target].knows_isa:
        known = ", ".join(name for name, about in TARGETS.items() if about.knows_isa)
        raise click.UsageError(f"--isa goes with the targets {known}: {target} computes the same on every processor")


def quantizer_of(target: str, recipe: str | None, isa: str | None) -> tuple[Any, Any]:
    """The quantizer of a target that asks what a recipe asks, by name or from a file, and the algorithms of the recipe.

    ``isa``: of the processors that will run the model, as `check_isa` lets pass; None for this one. Raises
    `AnnotationError` for a name that is none, `FileFormatError` for a file that is none.
    """
    quantizer = looked_up(TARGETS[target].quantizer)(**({} if isa is None else {"isa": isa}))
    if recipe is None or Path(recipe).suffix not in RECIPES:
        return quantizer.set_global(recipe or DEFAULT_RECIPE), ()
    import quant2e

    asked = quant2e.Recipe.from_file(recipe)
    return asked.apply(quantizer.set_global(DEFAULT_RECIPE)), asked.algorithms


def lowered(target: str, model: Any, path: Path, *, verify: bool, data: Any) -> Any:
    """The program of a quantized model, written to ``path``, which appears whole and after it was compared, or not."""
    about = TARGETS[target]
    lower = looked_up(about.lower)
    if about.writes:
        return lower(model, path=path, verify=verify, verify_inputs=data)
    program = lower(model, verify=verify, verify_inputs=data)
    program.save(path)
    return program


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written: ``lines`` for people, ``files`` by what they are, and the report of the program, if one was."""

    lines: list[str]
    files: dict[str, str]
    program_report: Any = None


def written(model: Any, output: Path | None, target: str, program: Path | None) -> Written:
    """Write a quantized model to ``output``, and its program, verified, to ``program``; either where it is given."""
    found = Written(lines=[], files={})
    if output is not None:
        model.save(output)
        found.lines.extend(wrote(output))
        found.files["output"] = str(output)
    if program is None:
        return found
    made = lowered(target, model, program, verify=True, data=())
    lines, files = [*found.lines, repr(made), *wrote(program)], {**found.files, "program": str(program)}
    return Written(lines=lines, files=files, program_report=made.report)


def program_files(path: Path) -> list[Path]:
    """The file at ``path``, and the one that its target writes beside it."""
    suffixes = [target.beside for target in TARGETS.values() if target.beside and target.suffix == path.suffix]
    return [path, *map(path.with_suffix, suffixes)]


def wrote(path: Path) -> list[str]:
    """A line for each file that was written, with its size."""
    return [f"wrote {one} ({one.stat().st_size:,} bytes)" for one in program_files(path)]


def check_program_path(path: Path, target: str) -> None:
    """Raise a usage error for a program file whose suffix is not that of its target."""
    wanted = TARGETS[target].suffix
    if path.suffix != wanted:
        raise click.UsageError(f"the program of target {target} is a file that ends in {wanted}, not {path.name!r}")


def target_of_program(path: Path) -> str | None:
    """The target whose programs have the suffix of ``path``; None where that says nothing."""
    found = [name for name, target in TARGETS.items() if target.suffix == path.suffix]
    return found[0] if len(found) == 1 else None
