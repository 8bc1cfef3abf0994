"""docs/reports.md: its code runs, and writes what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/reports.md"


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    exec(compile(block, str(PAGE), "exec"), {"__name__": "reports"})
    assert {path.name for path in tmp_path.iterdir()} == {"run.html", "graph.json", "graph_verdicts.json"}
    titles = re.findall(r"<h2[^>]*>([^<]+)</h2>", (tmp_path / "run.html").read_text(encoding="utf-8"))
    named = re.findall(r"^\| ([\w ]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert titles[:6] == [*named[1:7]]
    assert titles[6:] == ["Sensitivity"]
