"""The code of docs/language_models.md and of its example, run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "language_models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def run(blocks: list[str]) -> None:
    names: dict[str, object] = {"__name__": "language_models"}
    for code in blocks:
        exec(compile(code, "language_models.md", "exec"), names)


@pytest.mark.slow
def test_graphs_generate():
    run([code for code in BLOCKS if "lowered" not in code])


@pytest.mark.slow
@pytest.mark.inductor
def test_programs_generate(tmp_path, monkeypatch):
    pytest.importorskip("executorch")
    monkeypatch.chdir(tmp_path)
    run([BLOCKS[0], BLOCKS[-1]])


@pytest.mark.slow
def test_the_example_prints_the_same_tokens_twice(capsys):
    pytest.importorskip("executorch")
    runpy.run_path(str(ROOT / "examples" / "decoder_with_kv_cache.py"), run_name="__main__")
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines() if "[[" in line)
    assert lines["Q/DQ"].strip() == lines["program"].strip()
