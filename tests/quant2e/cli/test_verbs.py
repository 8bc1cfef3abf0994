"""The command line as a whole: what every verb has, how it starts, and that wrong arguments are told at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quant2e.cli.verbs import VERBS, main

ROOT = Path(__file__).parents[3]

PROBE = """
import sys
from quant2e.cli import main
for arguments in [["--help"], *([verb, "--help"] for verb in sys.argv[1:]), *([verb] for verb in sys.argv[1:]),
                  ["quantize", "none.pt2", "--target", "x86", "-o", "a.pt2"], ["quantize", "--target", "vax"]]:
    main(arguments)
print(*sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "rich", "onnx", "executorch"}))
"""


def test_help_and_wrong_arguments_need_no_torch():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROBE, *VERBS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_the_module_runs_and_the_exit_code_is_the_processs():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "quant2e", "lower", "none.pt2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no file none.pt2" in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example_and_what_all_have(capsys, verb):
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"example:\n  quant2e {verb} " in said
    assert all(option in said for option in ("--json", "--quiet", "--verbose", "--traceback", "--help"))
    assert max(map(len, said.splitlines())) <= 120


def test_the_list_of_verbs_is_whole(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    listed = said[said.index("Commands:") : said.index("example:")].split("\n")[1:]
    assert [line.split()[0] for line in listed if line.strip()] == list(VERBS)
    assert all("..." not in line for line in listed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "none.pt2", "--target", "x86", "-o", "a.pt2"], "there is no file none.pt2"),
        (["quantize", "{calib}", "--target", "x86", "-o", "a.pt2"], "does not end in .pt2, or module:function"),
        (["quantize", "{model}", "--target", "vax", "-o", "a.pt2"], "'vax' is not one of 'xnnpack', 'x86', 'onnx'"),
        (["quantize", "{model}", "-o", "a.pt2"], "Missing option '--target'"),
        (["quantize", "{model}", "--target", "x86"], "nothing to write: give --output FILE.pt2, --program FILE"),
        (["quantize", "{model}", "--target", "x86", "-o", "no/a.pt2"], "there is no folder no to write a.pt2 to"),
        (["quantize", "{model}", "--target", "x86", "-o", "a.onnx"], "a.onnx does not end in .pt2"),
        (
            ["quantize", "{model}", "--target", "onnx", "--program", "a.pte"],
            "a file that ends in .onnx, not 'a.pte'",
        ),
        (["quantize", "{model}", "--target", "x86", "-o", "a.pt2", "--program", "a.pt2"], "are both a.pt2"),
        (["quantize", "{model}", "--target", "x86", "-o", "a.pt2", "--max-drop", "5"], "'5' is no share: 0.5%, or"),
        (["quantize", "{model}", "--target", "x86", "-o", "a.pt2", "--max-drop", "1%"], "goes with --evaluate"),
        (["quantize", "{model}", "--target", "x86", "-o", "a.pt2", "--evaluate", "top1"], "is not module:function"),
        (["quantize", "{model}", "--target", "x86", "-o", "a.pt2", "--mean", "a"], "'a' is not a number"),
        (["quantize", "{model}", "--target", "x86", "-o", "a.pt2", "--std", "0"], "'0' is not a positive number"),
        (["quantize", "{model}", "--target", "x86", "-o", "a.pt2", "--image-size", "0x4"], "is no size of images"),
        (["quantize", "{model}", "--target", "x86", "-o", "a.pt2", "--data", "no"], "there is no file or folder no"),
        (["quantize", "{model}", "--target", "x86", "-o", "a.pt2", "--data", "{model}"], "is a .npz or .safetensors"),
        (["lower", "{model}", "--target", "x86", "-o", "{model}"], "--output and MODEL_INT8.pt2 are both"),
        (["quantize", "{model}", "--target", "x86", "-o", "{folder}/../{folder.name}/model.pt2"], "and MODEL are both"),
        (["quantize", "{model}", "--target", "x86", "-o", "a.pt2", "--program", "./a.pt2"], "are both a.pt2"),
        (["tune", "{model}", "--target", "x86", "--evaluate", "m:f", "-o", "{model}"], "and MODEL are both"),
        (["quantize", "{model}", "--target", "x86", "-o", "{there}"], "is there and is no file"),
        (["inspect", "weights.pth"], "there is no file weights.pth"),
    ],
)
def test_wrong_arguments(capsys, monkeypatch, tmp_path, folder, arguments, said):
    monkeypatch.chdir(tmp_path)
    there = tmp_path.with_suffix(".pt2")
    there.mkdir()
    names = {"model": folder / "model.pt2", "calib": folder / "calib.npz", "folder": folder, "there": there}
    assert main([argument.format(**names) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in " ".join(captured.err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_is_refused_with_what_to_do(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("weights.pth").write_bytes(b"")
    assert main(["quantize", "weights.pth", "--target", "x86", "-o", "a.pt2"]) == 2
    assert "is a pickle, and reading one runs what is in it" in " ".join(capsys.readouterr().err.split())


def test_an_error_of_ours_is_one_sentence_and_of_others_says_that_it_is_none(run, folder, monkeypatch):
    broken = Path("broken.pt2")
    broken.write_bytes(b"no archive")
    result = run("inspect", broken)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("quant2e inspect: broken.pt2 is not a .pt2 file")
    assert result.stderr.count("\n") == 1
    monkeypatch.setattr("quant2e.quantized_model.load", lambda path: {}["nothing"])
    result = run("inspect", folder / "model.pt2")
    assert result.exit_code == 1
    assert result.stderr == "quant2e inspect: failed with KeyError: 'nothing' (--traceback shows where)\n"
    with pytest.raises(KeyError):
        run("inspect", folder / "model.pt2", "--traceback")


def test_json_is_all_that_stdout_has(run, folder, quantized):
    result = run("inspect", folder / "model.pt2", quantized, "--json")
    found = json.loads(result.stdout)["files"]
    assert [one["kind"] for one in found] == ["float model", "quantized model"]
    assert found[1]["inputs"] == [{"name": "x", "dtype": "float32", "sizes": [[0, 16], 3, 8, 8]}]
    assert found[1]["report"]["sqnr_db"] > 20
    assert found[1]["encodings"]["groups"]
