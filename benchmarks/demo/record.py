"""Measured tables as files: Markdown for people, JSON for programs, with the command and the machine beside the
numbers.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.timing import Machine
from quant2e.files import write_text


def record(
    path: Path,
    title: str,
    where: Machine,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    data: Sequence[Mapping[str, Any]] | None = None,
    more: str = "",
) -> None:
    """Write ``path`` with the endings ``.md`` and ``.json``; the command is the one that this process was started with.

    ``data``: the rows for programs, where those for people are not enough. ``more``: what people read above the table.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    script = Path(sys.argv[0])
    module = script.parent.name if script.stem == "__main__" else script.stem
    command = shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])
    lines = [f"# {title}", "", f"`{command}`", "", f"{where}", ""]
    lines += [more, ""] if more else []
    lines += ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *rows)]
    write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")
    plain = {
        "title": title,
        "command": command,
        "machine": asdict(where),
        "rows": data if data is not None else [dict(zip(heads, row, strict=True)) for row in rows],
    }
    write_text(path.with_suffix(".json"), json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
