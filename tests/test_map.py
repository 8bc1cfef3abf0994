"""The map of the files, ``docs/map.md``: every module with its first line. ``--update-golden`` writes it."""

from __future__ import annotations

import ast
import difflib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("quant2e", "quantizers", "lowering")
HEAD = """# Map of the files

Every module of the three packages with its first line, folder by folder. Written by
`pytest tests/test_map.py --update-golden`. How they fit together: [architecture.md](architecture.md).
"""


def first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def page() -> str:
    lines, folders = [HEAD], sorted({path.parent for path in modules()}, key=order)
    for folder in folders:
        lines.append(f"## `{folder.relative_to(ROOT).as_posix()}/`\n\n{first_line(folder / '__init__.py')}\n")
        files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        rows = [f"| `{path.name}` | {first_line(path)} |" for path in files]
        lines += ["| file | what it is |", "|---|---|", *rows] if rows else []
        lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def order(folder: Path) -> tuple[int, str]:
    path = folder.relative_to(ROOT).as_posix()
    return PACKAGES.index(path.split("/")[0]), path


def test_the_map_is_current(request):
    path, text = ROOT / "docs" / "map.md", page()
    if request.config.getoption("--update-golden"):
        path.write_text(text, encoding="utf-8")
    stored = path.read_text(encoding="utf-8")
    difference = "".join(
        difflib.unified_diff(stored.splitlines(True), text.splitlines(True), "docs/map.md", "the files")
    )
    assert not difference, f"{difference}\nrun: pytest tests/test_map.py --update-golden"


def test_every_module_says_what_it_is():
    """In one line that fits, and ends as a sentence, a heading or an equation does."""
    said = {path.relative_to(ROOT).as_posix(): first_line(path) for path in modules()}
    wrong = [f"{path}: {line}" for path, line in said.items() if not re.search(r"[.:,?`)]$|=", line) or len(line) > 117]
    assert wrong == []


def test_the_paths_that_the_pages_name_exist():
    """In every page but the measured results: paths of the packages, the tests, the benchmarks and the pages."""
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
    named = re.compile(r"`((?:quant2e|quantizers|lowering|tests|benchmarks|docs)/[\w./-]*)`")
    missing = [
        f"{page.name}: {path}"
        for page in pages
        for path in named.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / path).exists()
    ]
    assert missing == []
