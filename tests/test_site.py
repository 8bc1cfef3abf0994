"""The site: every page of the navigation is gathered, every public module has one, and the strict build passes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.gather_pages import MODULES, main

ROOT = Path(__file__).parents[1]
NAVIGATION = re.findall(r": ([\w./]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_page_of_the_navigation_is_gathered_and_every_page_of_docs_is_in_it(tmp_path):
    pages = {page.relative_to(tmp_path / "pages").as_posix() for page in main(tmp_path / "pages")}
    assert set(NAVIGATION) <= pages
    assert len(set(NAVIGATION)) == len(NAVIGATION)
    assert {page for page in pages if page.startswith(("docs/", "reference/"))} <= set(NAVIGATION)


def test_every_public_module_has_a_page():
    told = {path.stem for path in (ROOT / "tests/golden/public_api").glob("*.txt")}
    assert set(MODULES) == told


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="needs mkdocs, of the extra site")
def test_the_site_is_built_without_a_warning(tmp_path):
    main(tmp_path / "pages")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = config.replace("build/site_pages", str(tmp_path / "pages")).replace("paths: [.]", f"paths: ['{ROOT}']")
    (tmp_path / "mkdocs.yml").write_text(config.replace("build/site", str(tmp_path / "site")), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert 'id="quant2e.quantize"' in (tmp_path / "site/reference/quant2e.html").read_text(encoding="utf-8")
