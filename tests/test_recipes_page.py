"""The code of docs/recipes.md, run as it stands; what it prints last is what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def test_the_code_runs_and_prints_what_the_page_shows(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "recipes"}
    printed = ""
    for number, (language, block) in enumerate(BLOCK.findall(PAGE), start=1):
        if language == "text":
            assert printed.endswith(block.strip())
            continue
        exec(compile(block, f"recipes.md, block {number}", "exec"), namespace)
        printed = capsys.readouterr().out.strip() or printed
