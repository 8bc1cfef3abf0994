"""The code of docs/qat.md, run as it stands, one block after the other; what it prints is what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "qat.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def test_the_code_runs_and_prints_what_the_page_shows(capsys):
    blocks = BLOCK.findall(PAGE)
    (shown,) = (text for kind, text in blocks if kind == "text")
    names: dict[str, object] = {"__name__": "qat"}
    for code in (text for kind, text in blocks if kind == "python"):
        exec(compile(code, "qat.md", "exec"), names)
    assert capsys.readouterr().out.strip() == shown.strip()
