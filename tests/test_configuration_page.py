"""The code of docs/configuration.md, run as it stands; what it prints is what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def test_the_code_runs_and_prints_what_the_page_shows(capsys):
    namespace = {"__name__": "configuration"}
    shown, printed = [], []
    for number, (language, block) in enumerate(BLOCK.findall(PAGE), start=1):
        if language == "text":
            shown.append(block.strip())
            continue
        exec(compile(block, f"configuration.md, block {number}", "exec"), namespace)
        if said := capsys.readouterr().out.strip():
            printed.append(said)
    assert printed == shown
    assert len(shown) == 3
