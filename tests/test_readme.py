"""The README's Python code, run as it stands, and its commands and links, held against the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs all Python blocks in order, in one namespace, in an empty folder; returns the namespace."""
    monkeypatch.chdir(tmp_path)

    def run_blocks():
        namespace = {"__name__": "readme"}
        for number, block in enumerate(blocks("python"), start=1):
            exec(compile(block, f"README.md, block {number}", "exec"), namespace)
        return namespace

    return run_blocks


@pytest.mark.inductor
@pytest.mark.slow
def test_the_code_runs_and_does_what_its_comments_say(run, tmp_path, capsys):
    import torch

    names = run()
    inputs = names["example_inputs"]
    assert torch.equal(names["again"](*inputs), names["result"](*inputs))
    assert {path.name for path in tmp_path.iterdir()} >= {"model_int8.pt2", "model_int8.pte", "steps_int8.pt2"}
    assert str(names["result"].report) in capsys.readouterr().out
    plain = torch.export.load(tmp_path / "model_int8.pt2").module()
    assert torch.equal(plain(*inputs), names["result"](*inputs))
    assert (tmp_path / "model_int8.pte").read_bytes() == names["program"].buffer


def test_the_top_of_the_page_is_short():
    code = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert 15 <= len(code) <= 22


def test_the_page_is_short():
    assert len(README.splitlines()) < 150


def test_every_command_is_a_target_of_the_makefile():
    rules = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    targets = {name for rule in rules for name in rule.split()}
    pages = [README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")]
    commands = {name for page in pages for name in re.findall(r"\bmake ([\w-]+)", page)}
    assert {"demo", "test"} <= commands <= targets


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    local = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in local if not ((ROOT / page).parent / link).exists()] == []


def test_the_files_named_in_the_pages_exist():
    pages = ["README.md", "CONTRIBUTING.md", "docs/architecture.md"]
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"`((?:quant2e|quantizers|lowering|tests|benchmarks|docs)/[\w/.]*)`", text))
    assert sorted(path for path in named if not (ROOT / path).exists()) == []
