"""Versions: what the package metadata promises, warnings about others, one file that asks, and names that are there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quant2e import versions

ROOT = Path(__file__).parents[1]
PACKAGES = ("quant2e", "quantizers", "lowering")
HOME = "quant2e/versions.py"
LIBRARIES = ("torch", "executorch", "torchao", "numpy", "onnx", "onnxruntime", "onnxscript", "transformers")

PINNED = (versions.TORCH, versions.EXECUTORCH)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def sources():
    found = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in found}


def dotted(node):
    """``a.b.c`` of an attribute chain that starts at a name; empty for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def of_library(chain):
    return chain.split(".")[0] in LIBRARIES


# ------------------------------------------------------------------------------------------------- what is promised


def test_the_dependencies_are_what_was_tested():
    assert versions.TORCH.requirement == "torch>=2.13,<2.15"
    assert versions.TORCH.requirement in PROJECT["dependencies"]
    assert PROJECT["optional-dependencies"]["executorch"] == [versions.EXECUTORCH.requirement]
    assert PROJECT["requires-python"] == f">={versions.PYTHON.requirement.partition('>=')[2].partition(',')[0]}"
    tested = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    assert tested == {f"3.{minor}" for minor in range(versions.PYTHON.oldest[1], versions.PYTHON.newest[1] + 1)}


def test_the_environments_of_make_are_the_oldest_and_the_newest():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, which in (("OLDEST", "oldest"), ("NEWEST", "newest")):
        wanted = [f"{lib.name}=={'.'.join(map(str, getattr(lib, which)))}.*" for lib in PINNED]
        assert f"{name} := {' '.join(wanted)}\n" in text


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.13.0+cpu", ""),
        ("2.14.1", ""),
        ("2.15.0", "quant2e is tested with torch 2.13 to 2.14, and 2.15.0 is newer: capture, calibration and files"),
        ("2.15.0a0+git1234", "2.15.0a0+git1234 is newer"),
        ("3.0.0", "compared with its Q/DQ graph, so that wrong numbers are an error"),
        ("2.12.1", "2.12.1 is older: names that it lacks end in errors. Install 'torch>=2.13,<2.15'"),
        ("unknown", "unknown is older"),
    ],
)
def test_what_is_said_of_a_version(version, said):
    advice = versions.TORCH.advice(version)
    assert said in advice
    assert bool(said) == bool(advice)


def test_an_unknown_newer_torch_is_a_warning_once(monkeypatch):
    monkeypatch.setattr(versions, "TORCH_VERSION", "2.99.0")
    versions.warn_of_untested_torch.cache_clear()
    with pytest.warns(UserWarning, match=r"2\.99\.0 is newer"):
        versions.warn_of_untested_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_of_untested_torch()
    versions.warn_of_untested_torch.cache_clear()


def test_an_unknown_newer_executorch_is_a_warning(monkeypatch):
    monkeypatch.setattr(versions.metadata, "version", {"executorch": "1.9.0"}.__getitem__)
    versions.warn_of_untested_executorch.cache_clear()
    with pytest.warns(UserWarning, match=r"executorch 1\.4 to 1\.5, and 1\.9\.0 is newer: fewer ops may be delegated"):
        versions.warn_of_untested_executorch()
    versions.warn_of_untested_executorch.cache_clear()


def test_importing_quant2e_with_an_unknown_torch_works():
    code = (
        "import warnings, torch\ntorch.__version__ = '2.99.0'\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n    from quant2e import quantize\n"
        "print([str(w.message) for w in told])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("2.99.0 is newer") == 1


# ------------------------------------------------------------------------------------------------- one file that asks


def version_checks(source: str) -> Iterator[tuple[int, str]]:
    """What asks for a version of a library, in whatever way, with the lines.

    ``library.__version__`` and ``torch.version``; metadata of a distribution by its name; ``hasattr`` and ``getattr``
    with a default of a name that is written down; an import that may fail, with another way to go on.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr="__version__") if of_library(dotted(node)):
                yield node.lineno, f"{dotted(node)}"
            case ast.ImportFrom(module=str(module)) if of_library(module):
                yield from (
                    (node.lineno, f"{module}.{a.name}") for a in node.names if a.name in {"__version__", "version"}
                )
            case ast.Attribute() if dotted(node).startswith("torch.version") or dotted(node) == "sys.version_info":
                yield node.lineno, dotted(node)
            case ast.Call(func=function, args=[ast.Constant(value=str(name))]) if (
                dotted(function).rpartition(".")[2] == "version" and name in LIBRARIES
            ):
                yield node.lineno, f"version({name!r})"
            case ast.Call(func=ast.Name(id="hasattr"), args=[owner, ast.Constant(value=str(name))]) if of_library(
                dotted(owner)
            ):
                yield node.lineno, f"hasattr({dotted(owner)}, {name!r})"
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(name)), _]) if of_library(
                dotted(owner)
            ):
                yield node.lineno, f"getattr({dotted(owner)}, {name!r})"
            case ast.Try(handlers=handlers) if any(_goes_on(handler) for handler in handlers):
                imports = [
                    n for part in node.body for n in ast.walk(part) if isinstance(n, ast.Import | ast.ImportFrom)
                ]
                names = [a.name if isinstance(n, ast.Import) else str(n.module) for n in imports for a in n.names]
                yield from ((node.lineno, f"try: import {name}") for name in names if of_library(name))


def _goes_on(handler: ast.ExceptHandler) -> bool:
    """Whether a handler takes what a failed import or lookup raises, and goes on without it."""
    caught = {dotted(kind) for kind in ast.walk(handler.type)} if handler.type else {"Exception"}
    failures = {"ImportError", "ModuleNotFoundError", "AttributeError", "Exception"}
    return bool(caught & failures) and not isinstance(handler.body[-1], ast.Raise)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\nif torch.__version__ > '2.13': pass", ["torch.__version__"]),
        ("from torch import __version__", ["torch.__version__"]),
        ("import torch\nx = torch.version.cuda", ["torch.version.cuda", "torch.version"]),
        ("from importlib.metadata import version\nversion('executorch')", ["version('executorch')"]),
        ("import torch\nhasattr(torch.nn, 'RMSNorm')", ["hasattr(torch.nn, 'RMSNorm')"]),
        ("import torch\ngetattr(torch, 'sym_sum', None)", ["getattr(torch, 'sym_sum')"]),
        ("try:\n    import torch.new\nexcept ImportError:\n    new = None", ["try: import torch.new"]),
        ("try:\n    import onnx\nexcept ImportError as e:\n    raise ValueError from e", []),
        ("import sys\nif sys.version_info > (3, 12): pass", ["sys.version_info"]),
        ("import torch\nx = torch.nn.Module", []),
    ],
)
def test_the_scanner_sees(source, found):
    assert [what for _, what in version_checks(source)] == found


def test_one_file_asks_for_versions():
    asked = {(path, what) for path, source in sources().items() for _, what in version_checks(source)}
    assert {what for path, what in asked if path == HOME} >= {"torch.__version__", "sys.version_info"}
    assert sorted(f"{path}: {what}" for path, what in asked if path != HOME) == []


# ------------------------------------------------------------------------------------------------- names are there


def names_of_libraries(source: str) -> set[tuple[str, ...]]:
    """What a source takes from torch and ExecuTorch by name: ``(module, name)``, or a dotted chain from ``torch``."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                found |= {(a.name,) for a in node.names if of_library(a.name)}
            case ast.ImportFrom(module=str(module)) if of_library(module):
                found |= {(module, a.name) for a in node.names}
            case ast.Attribute() if (chain := dotted(node)).startswith("torch."):
                found.add(("torch", *chain.split(".")[1:]))
    return found


def is_there(names: tuple[str, ...]) -> bool:
    """Whether a module has a name, or a module below it of that name, and so on."""
    value = importlib.import_module(names[0])
    path = names[0]
    for name in names[1:]:
        path += f".{name}"
        if not hasattr(value, name):
            try:
                value = importlib.import_module(path)
            except ImportError:
                return False
        else:
            value = getattr(value, name)
    return True


def missing(names: set[tuple[str, ...]]) -> list[str]:
    """Those that the libraries of this environment do not have; not those of absent libraries, nor ops of ours."""
    installed = {name for name in LIBRARIES if importlib.util.find_spec(name)}
    wanted = {name for name in names if name[0].split(".")[0] in installed and name[1:3] != ("ops", "quant2e")}
    in_order = sorted(wanted, key=lambda name: (name[1:2] == ("ops",), name))  # modules register ops
    return [".".join(name) for name in in_order if not is_there(name)]


def test_the_lookup_finds_what_is_not_there():
    assert missing({("torch.nn", "Linear"), ("torch", "_inductor", "config"), ("torch.nn", "Linaer")}) == [
        "torch.nn.Linaer"
    ]


@pytest.mark.slow
def test_every_name_that_is_taken_from_a_library_is_there():
    """Public names and private ones, in the releases of this environment: what a new release has moved is listed."""
    taken = set().union(*(names_of_libraries(source) for source in sources().values()))
    assert ("torch._inductor.compile_fx", "compile_fx") in taken
    assert missing(taken) == []
    assert torch.__version__ == versions.TORCH_VERSION
