"""One name, one thing: no class and no public function at the top of two files has the same name."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]

TWICE = {
    "run": "the runner of passes, and a call of onnxruntime",
    "static_rules": "each backend's table of rules",
    "dynamic_rules": "each backend's table of rules",
}
"""Names that stand for the same thing in several files, and for what."""


def test_a_name_is_defined_once():
    files = defaultdict(list)
    for package in ("quant2e", "quantizers", "lowering"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                    files[node.name].append(str(path.relative_to(ROOT)))
    twice = {name: places for name, places in files.items() if len(set(places)) > 1}
    assert {name: places for name, places in twice.items() if name not in TWICE} == {}
    assert TWICE.keys() <= twice.keys(), "an exception that nothing needs any more"
