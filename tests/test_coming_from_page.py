"""docs/coming_from.md: its code runs, and what its tables call ours exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/coming_from.md"
TEXT = PAGE.read_text(encoding="utf-8")
PUBLIC = ("quant2e", "quant2e.pt2e", "quant2e.training", "quant2e.pytorch_quantization", "quantizers", "lowering")
FIRST, *SECTIONS = [
    (section.partition("\n")[0], re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL))
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)
]
IN_A_TABLE = {"range_policy", "linear", "QuantLSTM", "lowering"}
"""Words of the right column that are no names of ours: a keyword, an op, a module of theirs, a package."""


def run(title, blocks):
    names: dict[str, object] = {"__name__": "coming_from"}
    for code in [*FIRST[1], *blocks]:
        exec(compile(code, f"{PAGE.name}: {title}", "exec"), names)
    return names


@pytest.mark.parametrize(("title", "blocks"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_the_code_of_each_section_runs(title, blocks):
    run(title, [code for code in blocks if "to_onnx" not in code])


@pytest.mark.slow
def test_the_trained_model_is_exported():
    pytest.importorskip("onnxscript")
    title, blocks = next(section for section in SECTIONS if any("to_onnx" in code for code in section[1]))
    names = run(title, blocks[: 1 + next(i for i, code in enumerate(blocks) if "to_onnx" in code)])
    assert names["program"].verification is not None


def test_there_is_code_for_each_tool():
    assert [title for title, blocks in SECTIONS if not blocks] == []
    assert len(SECTIONS) == 6


def test_what_the_tables_call_ours_exists():
    """Names by themselves and calls in the right column are names, methods or attributes of the public modules."""
    modules = [importlib.import_module(name) for name in PUBLIC]
    known = {name for module in modules for name in [*dir(module), *module.__all__]}
    known |= {name for module in modules for each in module.__all__ for name in dir(getattr(module, each))}
    said = [row.rsplit("|", 2)[1] for row in TEXT.splitlines() if row.startswith("| ") and row.count("|") == 3]
    code = [found for cell in said for found in re.findall(r"`([^`]+)`", cell)]
    calls = {call for each in code for call in re.findall(r"(\w+)\(", each)}
    alone = {each.rsplit(".", 1)[-1] for each in code if re.fullmatch(r"[\w.]+", each) and not re.search(r"\d", each)}
    assert (calls | alone) - known - IN_A_TABLE == set()
