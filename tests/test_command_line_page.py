"""docs/command_line.md: its code and its commands run, in their order, in an empty folder; what it names exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from quant2e.cli.targets import TARGETS
from quant2e.cli.verbs import VERBS, main

PAGE = (Path(__file__).parents[1] / "docs/command_line.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("executorch")
    monkeypatch.chdir(tmp_path)
    for code in blocks("python"):
        exec(compile(code, "docs/command_line.md", "exec"), {})
    for line in "".join(blocks("sh")).splitlines():
        program, *arguments = shlex.split(line)
        assert program == "quant2e"
        assert main(arguments) == 0, capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt2", "calib.npz", "model_int8.pt2", "model_int8.pte"}


def test_every_verb_and_target_is_on_the_page():
    assert re.findall(r"^\| `(\w+)` \|.*\|.*\|$", PAGE, flags=re.MULTILINE)[: len(VERBS)] == list(VERBS)
    assert set(re.findall(r"^\| `(\w+)` \| [^|]* \| `\.\w+`[^|]*\|", PAGE, flags=re.MULTILINE)) == set(TARGETS)


def test_every_option_that_the_page_names_exists(capsys):
    said = ""
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        said += capsys.readouterr().out
    known = set(re.findall(r"--[a-z][a-z-]+", said))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) <= known
