"""Who may import whom: ``benchmarks, docs, examples, tests → lowering, quantizers → quant2e → torch, numpy``.

The sources are parsed, not run, so an import that only happens on some path counts as well. A module that is
reached as an attribute (``torch.ao.quantization``) or by name (``importlib.import_module("executorch")``) is an
import too. What is expensive or optional is imported inside functions of the one place that needs it.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS: Mapping[str, frozenset[str]] = {
    "quant2e": frozenset({"quant2e"}),
    "quantizers": frozenset({"quantizers", "quant2e"}),
    "lowering": frozenset({"lowering", "quant2e"}),
    "benchmarks": frozenset({"benchmarks", "lowering", "quantizers", "quant2e"}),
    "docs": frozenset({"lowering", "quantizers", "quant2e"}),
    "examples": frozenset({"lowering", "quantizers", "quant2e"}),
    "tests": frozenset({"tests", "docs", "examples", "benchmarks", "lowering", "quantizers", "quant2e"}),
}
"""Each folder, and the folders of this project that it may import."""

SHIPPED = ("quant2e", "quantizers", "lowering")
"""The packages that a user installs: torch, numpy and the standard library only, but for `LAZY` and `OPTIONAL`."""

LAZY: Mapping[str, str] = {
    "executorch": "executorch",
    "torch._inductor": "torch._inductor",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "torch.onnx": "onnx",
    "openvino": "openvino",
}
"""Module prefix → target. Only lowering may import it, inside functions, and one file (or folder) per target."""

COMPILED = "quant2e/calibration/compiled.py"
"""The one file of the core that may set an option of ``torch._inductor``, inside a function: `torch.compile` needs it.
"""

OPTIONAL: Mapping[str, str | tuple[str, ...]] = {
    "hypothesis": "quantizers/conformance/",
    "jinja2": "quant2e/page/render.py",  # comes with torch, and so does markupsafe
    "markupsafe": "quant2e/page/render.py",
    "matplotlib": "quant2e/page/plots.py",
    "torchao": "quantizers/torchao.py",
    "optuna": "quant2e/accuracy/tuning/optuna_import.py",
    "PIL": "quant2e/cli/inputs/images.py",
    "rich": ("quant2e/calibration/progress.py", "quant2e/accuracy/tuning/table.py", "quant2e/stages.py"),
    "scipy": "quant2e/accuracy/tuning/budgets.py",
    "transformers": "lowering/language_models/",
    "sympy": "quant2e/storage/",  # comes with torch
    "yaml": "quant2e/documents/yaml_text.py",
}
"""Module → the only place of `SHIPPED` that may import it, inside functions: users have it, or do without that place.
"""

INSTEAD: Mapping[str, str] = {
    "torch.ao": "take the quantized_decomposed ops from quant2e.graph.qdq_ops; "
    "specs and observers have their own files",
    "torchao": "recognise its objects by their shape (quant2e/annotation/interop.py); "
    "compare with it in tests and benchmarks",
    "executorch": "call lowering.to_executorch, or hand the user a graph to pass on",
    "torch._inductor": "call lowering.to_inductor",
    "onnx": "call lowering.to_onnx",
    "openvino": "call lowering.to_openvino",
    "lowering": "take the lowered program as an argument; only the command line looks the lowering up by name",
    "quantizers": "take a Quantizer as an argument; only the command line looks it up by name",
    "benchmarks": "move what is needed into a package",
    "tests": "move what is needed into a package",
}

COMMAND_LINE = "quant2e/cli/"
"""The one folder that looks up by name what is in the other packages; and that imports click."""

DIALECT = "quant2e/graph/qdq_ops.py"
"""The one file that may reach into torch.ao: importing it registers the quantized_decomposed ops."""


@dataclass(frozen=True)
class Import:
    """``module`` as imported on ``line``; ``lazy`` inside a function, ``by_name`` through importlib."""

    module: str
    line: int
    lazy: bool
    by_name: bool = False

    def is_of(self, prefix: str) -> bool:
        return self.module == prefix or self.module.startswith(prefix + ".")


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute chain that starts at a name; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def modules_of(node: ast.AST, package: list[str]) -> Iterator[tuple[str, bool]]:
    """Modules that one syntax node imports, each with whether it is imported by name."""
    match node:
        case ast.Import():
            yield from ((alias.name, False) for alias in node.names)
        case ast.ImportFrom():
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", False) for alias in node.names)
        case ast.Call(args=[ast.Constant(value=str(name)), *_]):
            if dotted(node.func).split(".")[-1] in {"import_module", "__import__"}:
                yield name, True
        case ast.Attribute() if (chain := dotted(node)).startswith("torch."):
            yield chain, False


def imports(path: str, source: str) -> list[Import]:
    """Every import in a file, in the order of the lines. ``path`` is relative to the root, with forward slashes."""
    package = path.split("/")[:-1]
    found: set[Import] = set()

    def visit(node: ast.AST, *, lazy: bool) -> None:
        for module, by_name in modules_of(node, package):
            found.add(Import(module, node.lineno, lazy, by_name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for outside in (*node.decorator_list, node.args, *filter(None, [node.returns])):
                visit(outside, lazy=lazy)
            for inside in node.body:
                visit(inside, lazy=True)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, lazy=lazy or isinstance(node, ast.Lambda))

    visit(ast.parse(source, path), lazy=False)
    return sorted(found, key=lambda i: (i.line, len(i.module), i.module))


def complaint(path: str, found: Import) -> str:
    """Why this import may not be where it is; empty when it may."""
    folder = path.split("/")[0]
    top = found.module.split(".")[0]
    if top in LAYERS:
        looked_up = path.startswith(COMMAND_LINE) and found.by_name and found.lazy
        return "" if top in LAYERS[folder] or looked_up else f"{folder} may not import {top}"
    if folder not in SHIPPED:
        return ""
    if found.is_of("torch.ao"):
        return "" if path == DIALECT else "only quant2e/graph/qdq_ops.py may reach into torch.ao"
    if path.startswith(OPTIONAL.get(top, "/")):
        return "" if found.lazy else "import it inside the function that needs it: it is optional"
    if any(found.is_of(prefix) for prefix in LAZY):
        if folder != "lowering" and not (path == COMPILED and found.is_of("torch._inductor")):
            return f"{folder} may not import {top if top != 'torch' else '.'.join(found.module.split('.')[:2])}"
        return "" if found.lazy else f"import it inside the function that needs it: importing {folder} must not load it"
    if top in {"torch", "numpy"} or top in sys.stdlib_module_names:
        return ""
    if top == "click" and path.startswith(COMMAND_LINE):
        return ""
    return f"{folder} depends on torch, numpy and the standard library only"


def advice(module: str) -> str:
    matching = [prefix for prefix in INSTEAD if Import(module, 0, lazy=False).is_of(prefix)]
    return f"; instead: {INSTEAD[matching[0]]}" if matching else ""


def violations(sources: Mapping[str, str]) -> list[str]:
    """One line per import that the layering forbids, over ``{path: source}``."""
    lines: list[str] = []
    homes: dict[str, set[str]] = defaultdict(set)
    for path, source in sorted(sources.items()):
        told: set[tuple[int, str]] = set()
        for found in imports(path, source):
            reason = complaint(path, found)
            if reason and (found.line, reason) not in told:
                told.add((found.line, reason))
                lines.append(f"{path}:{found.line}: imports {found.module}: {reason}{advice(found.module)}")
            if path.startswith("lowering/"):
                for prefix, target in LAZY.items():
                    if found.is_of(prefix):
                        homes[target].add(path.split("/")[1])
    lines += [
        f"lowering/: {target} is imported in {', '.join(sorted(places))}: keep it to one file or one folder"
        for target, places in sorted(homes.items())
        if len(places) > 1
    ]
    return lines


def project_sources() -> dict[str, str]:
    files = (file for folder in LAYERS for file in sorted((ROOT / folder).rglob("*.py")))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_the_project_follows_its_layers():
    sources = project_sources()
    assert {path.split("/")[0] for path in sources} >= {*SHIPPED, "tests"}
    assert violations(sources) == []


ALLOWED = [
    ("quant2e/plan.py", "import torch, numpy as np, dataclasses\nfrom quant2e.specs import ANNOTATION"),
    ("quant2e/passes/fold.py", "from ..errors import PassError\nfrom . import order"),
    ("quant2e/graph/qdq_ops.py", "import torch.ao.quantization.fx._decomposed"),
    ("quant2e/cli/verb.py", "import importlib\ndef main():\n    importlib.import_module('lowering')"),
    ("quant2e/cli/verb.py", "import click"),
    (
        "quantizers/xnnpack.py",
        "from quant2e import op\nfrom quantizers.rule import Rule\nimport torch.nn.functional as F",
    ),
    (
        "lowering/inductor.py",
        "def f(g):\n    from torch._inductor.compile_fx import compile_fx\n    return compile_fx(g)",
    ),
    ("lowering/inductor.py", "import torch\ndef f():\n    return torch._inductor.config.freezing"),
    ("quant2e/calibration/compiled.py", "def f():\n    import torch._inductor.config"),
    ("lowering/mobile/xnnpack.py", "def f():\n    import executorch.exir"),
    ("lowering/onnx.py", "def f():\n    import onnx, onnxruntime\n    import torch.onnx"),
    ("benchmarks/demo.py", "import rich, transformers, torchao, lowering, quantizers"),
    ("quantizers/conformance/generate.py", "def f():\n    from hypothesis import strategies"),
    ("quantizers/torchao.py", "def f():\n    import torchao.quantization.pt2e"),
    ("quant2e/calibration/progress.py", "def f():\n    from rich.progress import Progress"),
    ("tests/test_peers.py", "import torchao, torch.ao.quantization, executorch.exir, benchmarks.demo"),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_allowed(path, source):
    assert violations({path: source}) == []


FORBIDDEN = [
    ("quant2e/plan.py", "import torchao", "torch, numpy and the standard library only; instead: recognise"),
    ("quant2e/plan.py", "import click", "torch, numpy and the standard library only"),
    ("quant2e/plan.py", "import yaml", "torch, numpy and the standard library only"),
    (
        "quant2e/plan.py",
        "import torch.ao.quantization",
        "quant2e/graph/qdq_ops.py may reach into torch.ao; instead: take",
    ),
    ("quant2e/plan.py", "from torch import ao", "only quant2e/graph/qdq_ops.py"),
    ("quant2e/plan.py", "import torch\nx = torch.ao.quantization", "plan.py:2: imports torch.ao"),
    ("quant2e/plan.py", "def f():\n    import executorch.exir", "plan.py:2: imports executorch.exir"),
    ("quant2e/plan.py", "def f():\n    __import__('executorch')", "quant2e may not import executorch; instead: call"),
    ("quant2e/plan.py", "import torch\ndef f():\n    torch._inductor.config", "quant2e may not import torch._inductor"),
    ("quant2e/api.py", "from lowering import to_inductor", "quant2e may not import lowering; instead: take"),
    ("quant2e/api.py", "def f():\n    import quantizers", "quant2e may not import quantizers"),
    ("quant2e/api.py", "import importlib\nimportlib.import_module('lowering')", "quant2e may not import lowering"),
    ("quant2e/cli/verb.py", "import importlib\nimportlib.import_module('lowering')", "quant2e may not import lowering"),
    (
        "quant2e/calibration/compiled.py",
        "import importlib\ndef f():\n    importlib.import_module('lowering.inductor.compile')",
        "quant2e may not import lowering; instead: take the lowered program as an argument",
    ),
    ("quant2e/calibration/compiled.py", "import torch._inductor.config", "importing quant2e must not load it"),
    ("quant2e/calibration/compiled.py", "def f():\n    import onnx", "quant2e may not import onnx"),
    ("quant2e/passes/fold.py", "from ...lowering import x", "quant2e may not import lowering"),
    ("quantizers/x86.py", "import lowering.inductor", "quantizers may not import lowering"),
    ("quantizers/x86.py", "from torchao.quantization import pt2e", "torch, numpy and the standard library only"),
    ("quantizers/conformance/generate.py", "import hypothesis", "inside the function that needs it: it is optional"),
    ("quantizers/rule.py", "def f():\n    import hypothesis", "torch, numpy and the standard library only"),
    ("quant2e/calibration/progress.py", "import rich", "inside the function that needs it: it is optional"),
    ("quant2e/cli/verb.py", "def f():\n    import rich", "torch, numpy and the standard library only"),
    ("quantizers/torchao.py", "import torchao", "inside the function that needs it: it is optional"),
    ("lowering/api.py", "from quantizers import XNNPACKQuantizer", "lowering may not import quantizers"),
    ("lowering/inductor.py", "import torch._inductor.config", "inside the function that needs it"),
    ("lowering/inductor.py", "class A:\n    from torch import _inductor", "inside the function that needs it"),
    ("lowering/onnx.py", "import onnx\ndef f():\n    onnx.save()", "inside the function that needs it"),
    ("lowering/onnx.py", "def f(x=__import__('onnx')): ...", "inside the function that needs it"),
    ("docs/tour.py", "import benchmarks.demo", "docs may not import benchmarks"),
    ("benchmarks/demo.py", "from tests.models import Net", "benchmarks may not import tests; instead: move"),
]


@pytest.mark.parametrize(("path", "source", "said"), FORBIDDEN)
def test_forbidden(path, source, said):
    (line,) = violations({path: source})
    assert said in line
    assert line.startswith(f"{path}:")


def test_each_target_is_imported_in_one_place():
    lazily = "def f():\n    import executorch.exir"
    assert violations({"lowering/mobile/a.py": lazily, "lowering/mobile/b.py": lazily}) == []
    (line,) = violations({"lowering/a.py": lazily, "lowering/b.py": lazily})
    assert line == "lowering/: executorch is imported in a.py, b.py: keep it to one file or one folder"
