"""The verbs on models and data: files in, files and results out; what is refused before anything is written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import quant2e
from quant2e.cli.targets import ISAS
from quant2e.cpu import TARGETS

CODE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)

def nothing():
    return nn.Linear(8, 8)

def fails():
    return 1 // 0

def leaves():
    raise SystemExit(0)

def metric(model):
    with torch.no_grad():
        return float(model(torch.ones(2, 8)).abs().mean())
"""


@pytest.fixture
def code(run, monkeypatch):
    """``built:build`` and other functions of a user's, importable from the current folder."""
    Path("built.py").write_text(CODE)
    np.savez("x.npz", np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32))
    yield run
    monkeypatch.delitem(__import__("sys").modules, "built", raising=False)


def test_a_quantized_file_is_that_of_the_library(folder, quantized):
    model = quant2e.load(quantized)
    assert model.report.sqnr_db > 20
    assert model.encodings.quantizer == "XNNPACKQuantizer"
    assert model(torch.zeros(5, 3, 8, 8)).shape == (5, 4)


def test_a_model_of_the_users_code(code):
    result = code(
        "quantize",
        "built:build",
        "--data",
        "x.npz",
        "--target",
        "x86",
        "-o",
        "a.pt2",
        "--json",
        "--dynamic-batch",
        "16",
        "--recipe",
        "w8a8",
        "--batch-size",
        "4",
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["output"] == "a.pt2"
    assert found["data"]["batches"] == 6
    assert found["report"]["sqnr_db"] == quant2e.load("a.pt2").report.sqnr_db
    assert quant2e.load("a.pt2")(torch.zeros(7, 8)).shape == (7, 4)


def test_another_processor(run, folder):
    given = ("--data", folder / "calib.npz", "--target", "x86")
    for isa in ("avx2", "avx512_vnni"):
        result = run("quantize", folder / "model.pt2", *given, "--isa", isa, "-o", f"{isa}.pt2")
        assert result.exit_code == 0, result.output
    plain, vnni = (quant2e.load(f"{isa}.pt2").report for isa in ("avx2", "avx512_vnni"))
    assert any("AVX2" in note for note in plain.notes)
    assert any("AVX512 VNNI multiplies full ranges exactly" in note for note in vnni.notes)
    assert run("sensitivity", folder / "model.pt2", *given, "--isa", "avx2").exit_code == 0
    refused = run("quantize", folder / "model.pt2", *given, "--isa", "sse2", "-o", "a.pt2")
    assert refused.exit_code == 2
    assert "'sse2' is not one of" in refused.stderr


@pytest.mark.parametrize("verb", ["quantize", "sensitivity", "tune"])
def test_a_processor_for_a_target_that_knows_none(run, folder, verb):
    given = ("--data", folder / "calib.npz", "--target", "xnnpack", "--isa", "avx2")
    more = {"quantize": ("-o", "a.pt2"), "sensitivity": (), "tune": ("--evaluate", "built:metric", "-o", "a.pt2")}
    result = run(verb, folder / "model.pt2", *given, *more[verb])
    assert result.exit_code == 2
    assert "--isa goes with the targets x86, onnx, openvino" in result.stderr
    assert not Path("a.pt2").exists()


def test_processors_are_those_of_the_quantizer():
    assert set(ISAS) == set(TARGETS)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("built:nothing", "built:nothing returned a Linear: return (model, example_inputs)"),
        ("built:fails", "built:fails failed with ZeroDivisionError"),
        ("built:leaves", "built:leaves failed with SystemExit: 0"),
        ("built:gone", "built:gone: built has no function 'gone'"),
        ("gone:build", "gone:build: there is no module 'gone' here or on PYTHONPATH"),
    ],
)
def test_code_that_gives_no_model(code, model, said):
    result = code("quantize", model, "--data", "x.npz", "--target", "x86", "-o", "a.pt2")
    assert result.exit_code == 1
    assert result.stderr.startswith("quant2e quantize: ")
    assert said in result.stderr
    assert not Path("a.pt2").exists()


def test_what_is_refused_writes_nothing(run, folder, quantized):
    data = ("--data", folder / "calib.npz", "--target", "xnnpack", "-o", "a.pt2")
    result = run("quantize", quantized, *data)
    assert "is quantized already: give the float model that it was made from" in result.stderr
    result = run("quantize", folder / "model.pt2", *data, "--dynamic-batch", "4")
    assert "--dynamic-batch is for models of module:function" in result.stderr
    result = run("quantize", folder / "model.pt2", *data, "--recipe", "w9000")
    assert "'w9000' is not a recipe" in result.stderr or "9000 bits" in result.stderr
    result = run("quantize", folder / "model.pt2", *data, "--min-sqnr", "200")
    assert "the quantized model keeps too little" in result.stderr
    result = run("lower", folder / "model.pt2", "--target", "onnx", "-o", "a.onnx")
    assert "is a float model: quantize it first, with quant2e quantize" in result.stderr
    assert not Path("a.pt2").exists()


def test_pages(run, quantized):
    pytest.importorskip("matplotlib")
    result = run("inspect", quantized, "--html", "a.html")
    assert result.exit_code == 0, result.output
    assert "wrote a.html" in result.stdout
    assert "conv2d" in Path("a.html").read_text(encoding="utf-8")


def test_a_recipe_from_a_file(run, folder):
    pytest.importorskip("yaml")
    Path("r.yaml").write_text("recipe: 1\nrules:\n  - {op: linear, use: float}\n")
    result = run(
        "quantize",
        folder / "model.pt2",
        "--data",
        folder / "calib.npz",
        "--target",
        "xnnpack",
        "-o",
        "a.pt2",
        "--recipe",
        "r.yaml",
    )
    assert result.exit_code == 0, result.output
    assert quant2e.load("a.pt2").report.of("linear").kind == "float"


def test_compare_and_sensitivity(run, folder, quantized):
    data = ("--data", folder / "calib.npz", "--num-batches", "4")
    found = json.loads(run("compare", folder / "model.pt2", quantized, *data, "--json").stdout)
    assert {row["op"] for row in found["rows"]} >= {"conv2d", "linear"}
    found = json.loads(run("sensitivity", folder / "model.pt2", *data, "--target", "xnnpack", "--json").stdout)
    assert len(found["rows"]) >= 2


def test_tune_keeps_a_metric_or_says_that_nothing_does(code):
    arguments = (
        "tune",
        "built:build",
        "--data",
        "x.npz",
        "--target",
        "x86",
        "--evaluate",
        "built:metric",
        "-o",
        "a.pt2",
    )
    result = code(*arguments, "--max-drop", "50%", "--json", "-o", "a.pt2")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["met"]
    assert Path("a.pt2").exists()
    result = code(*arguments, "--max-drop", "2")
    assert result.exit_code == 2
    assert "--max-drop 2 is more than all of the metric" in " ".join(result.stderr.split())
    result = code(*arguments, "--max-drop", "0%", "--max-trials", "1")
    assert (result.exit_code, "no mix that was tried keeps the goal" in result.stderr) in {(1, True), (0, False)}


@pytest.mark.slow
@pytest.mark.parametrize(("target", "name", "module"), [("xnnpack", "a.pte", "executorch"), ("onnx", "a.onnx", "onnx")])
def test_programs_are_lowered_verified_and_inspected(run, folder, quantized, target, name, module):
    pytest.importorskip(module)
    result = run("lower", quantized, "--target", target, "-o", name, "--data", folder / "calib.npz")
    assert result.exit_code == 0, result.output
    verified = run("verify", quantized, name, "--data", folder / "calib.npz", "--json")
    assert json.loads(verified.stdout)["passed"], verified.output
    assert run("verify", quantized, name, "--steps", "0", "--sqnr", "1000").exit_code in (0, 1)
    (found,) = json.loads(run("inspect", name, "--json").stdout)["files"]
    assert found["checksum"]
    assert run("compare", folder / "model.pt2", name, "--data", folder / "calib.npz").exit_code == 0


@pytest.mark.slow
def test_a_model_for_openvino_is_made_verified_inspected_and_timed(run, folder):
    pytest.importorskip("openvino")
    data = ("--data", folder / "calib.npz")
    made = run("quantize", folder / "model.pt2", *data, "--target", "openvino", "-o", "q.pt2", "--program", "a.xml")
    assert made.exit_code == 0, made.output
    assert "wrote a.bin" in made.stdout
    verified = run("verify", "q.pt2", "a.xml", *data, "--json")
    assert json.loads(verified.stdout)["passed"], verified.output
    (found,) = json.loads(run("inspect", "a.xml", "--json").stdout)["files"]
    assert (found["kind"], found["checksum"]) == ("OpenVINO model", True)
    (timed,) = json.loads(run("bench", "a.xml", "--rounds", "2", "--json").stdout)["programs"]
    assert timed["footprint"]["unchanged"]
    Path("a.bin").write_bytes(Path("a.bin").read_bytes()[::-1])
    refused = run("verify", "q.pt2", "a.xml", *data)
    assert (refused.exit_code, "a.bin is not what a.xml was written with" in refused.stderr) == (1, True)


@pytest.mark.slow
@pytest.mark.inductor
def test_a_package_is_made_inspected_verified_and_timed(run, folder):
    data = ("--data", folder / "calib.npz")
    made = run("quantize", folder / "model.pt2", *data, "--target", "x86", "-o", "a.pt2", "--program", "aot.pt2")
    assert made.exit_code == 0, made.output
    (found,) = json.loads(run("inspect", "aot.pt2", "--json").stdout)["files"]
    assert found["kind"] == "package of AOTInductor (native code)"
    assert found["versions"]["torch"] == torch.__version__
    assert found["inputs"][0]["sizes"][1:] == [[3, 3], [8, 8], [8, 8]]
    assert found["encodings"]["groups"] == json.loads(json.dumps(quant2e.load("a.pt2").encodings.as_dict()["groups"]))
    assert found["lowering"]["verification"]["passed"]
    assert json.loads(run("verify", "a.pt2", "aot.pt2", *data, "--json").stdout)["passed"]
    timed = run("bench", "a.pt2", "aot.pt2", "--rounds", "3", "--json")
    assert len(json.loads(timed.stdout)["programs"]) == 2, timed.output
