"""The examples: each runs, and does what it is there to show; what deploys imports nothing of this project."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"


def main_of(name):
    return importlib.import_module(f"examples.{name}").main


@pytest.mark.slow
def test_a_cnn_for_a_phone_and_its_file_alone(tmp_path):
    program = main_of("cnn_for_a_phone")(tmp_path)
    assert not program.report.leftovers
    assert {path.name for path in tmp_path.iterdir()} == {"cnn_int8.pte", "cnn_int8.html"}
    images = torch.randn(3, 3, 32, 32)
    (deployed,) = main_of("deploy_pte")(tmp_path / "cnn_int8.pte", images)
    assert torch.equal(deployed, program(images))


@pytest.mark.slow
def test_an_encoder_with_padding(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers, of the extra demo")
    assert main_of("encoder_with_padding")(tmp_path) > 0.99


def test_training_in_ones_own_loop(tmp_path):
    in_float, trained = main_of("qat_in_your_loop")(tmp_path)
    assert in_float > 0.9
    assert trained > in_float - 0.03


@pytest.mark.slow
def test_accuracy_is_mended(tmp_path):
    before, after, worst = main_of("accuracy_mended")(tmp_path)
    assert worst == "linear_3", "its columns undo the spread of the rows before, so its one scale is too coarse"
    assert after > before + 6
    assert "SQNR by layer" in (tmp_path / "bad.html").read_text(encoding="utf-8")


def test_a_quantizer_for_new_hardware(tmp_path):
    result = main_of("quantizer_for_new_hardware")(tmp_path)
    assert {v.op.name: v.kind for v in result.report.verdicts if v.kind != "static"} == {"gelu": "float"}
    scales = [scale for group in result.encodings.groups if group.dtype == "int8" for scale in group.scale]
    assert scales
    assert all(torch.frexp(torch.tensor(scale)).mantissa == 0.5 for scale in scales)


@pytest.mark.slow
@pytest.mark.inductor
def test_a_package_needs_torch_alone(tmp_path):
    import lowering
    import quant2e
    from quantizers import X86InductorQuantizer

    torch.manual_seed(0)
    model, inputs = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval(), (torch.randn(4, 8),)
    result = quant2e.quantize(model, inputs, X86InductorQuantizer().set_global("w8a8"), [inputs[0]] * 3)
    package = lowering.package_inductor(result, path=tmp_path / "model_aot.pt2")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import deploy_package\n"
        "y = deploy_package.main(Path(sys.argv[2]), torch.load(sys.argv[3]))\n"
        "assert not any(name in sys.modules for name in ('quant2e', 'lowering'))\n"
        "torch.save(y, sys.argv[4])"
    )
    torch.save(inputs[0], tmp_path / "x.pt")
    arguments = [FOLDER, tmp_path / "model_aot.pt2", tmp_path / "x.pt", tmp_path / "y.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "y.pt"), package(*inputs))
    if shutil.which("g++") is None:
        pytest.skip("needs g++ for the program in C++; the package was run in Python")
    inputs[0].numpy().tofile(tmp_path / "x.f32")
    run = [built_with_torch(tmp_path), tmp_path / "model_aot.pt2", tmp_path / "x.f32", *inputs[0].shape]
    told = subprocess.run([*map(str, run)], check=True, capture_output=True, text=True).stdout
    assert [float(word) for word in told.split()] == pytest.approx(package(*inputs).flatten()[:8].tolist(), rel=1e-4)


def built_with_torch(folder):
    """The program in C++, built against the headers and libraries of the installed torch."""
    from torch.utils.cpp_extension import include_paths, library_paths

    program, libraries = folder / "run_package", library_paths()
    command = ["g++", "-std=c++20", FOLDER / "cpp/run_package.cpp", "-o", program, *(f"-I{p}" for p in include_paths())]
    command += [f"-L{path}" for path in libraries] + [f"-Wl,-rpath,{path}" for path in libraries]
    subprocess.run([*map(str, command), "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    return program


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_pte_runs_from_cpp(tmp_path):
    pytest.importorskip("executorch")
    import lowering
    import quant2e
    from quantizers import XNNPACKQuantizer

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10))
    inputs = (torch.randn(1, 3, 8, 8),)
    quantizer = XNNPACKQuantizer().set_global("w8a8")
    program = lowering.to_executorch(quant2e.quantize(model.eval(), inputs, quantizer, [inputs], min_sqnr_db=None))
    program.save(tmp_path / "model.pte")
    inputs[0].numpy().tofile(tmp_path / "x.f32")
    built = built_with_executorch(tmp_path)
    run = [built, tmp_path / "model.pte", tmp_path / "x.f32", *inputs[0].shape]
    told = subprocess.run([*map(str, run)], check=True, capture_output=True, text=True).stdout
    assert [float(word) for word in told.split()] == pytest.approx(program(*inputs).flatten()[:8].tolist(), rel=1e-4)
    few = subprocess.run([*map(str, run), "9"], check=False, capture_output=True, text=True)
    assert (few.returncode, "holds fewer than 1728 float32 values" in few.stderr) == (1, True)
    (tmp_path / "x.pte").write_bytes(b"no program")
    other = subprocess.run([built, tmp_path / "x.pte", *map(str, run[2:])], check=False, capture_output=True, text=True)
    assert (other.returncode, "loading the program failed" in other.stderr) == (1, True)


def built_with_executorch(folder):
    """The program in C++, built against the runtime in the installed ExecuTorch, as CMakeLists.txt says."""
    import executorch

    place, python = Path(next(iter(executorch.__path__))), sysconfig.get_config_var("LIBDIR")
    libraries = [*place.glob("extension/pybindings/_portable_lib*.so")]
    libraries.append(place / "backends/qualcomm/libqnn_executorch_backend.so")
    shared = Path(python) / sysconfig.get_config_var("LDLIBRARY")
    if not all(map(Path.exists, [*libraries, shared])) or shared.suffix == ".a":
        pytest.skip("ExecuTorch's runtime, or Python's, is not here as a shared library")
    headers = [place / "include", place / "include/executorch/runtime/core/portable_type/c10"]
    program = folder / "run_pte"
    command = ["g++", "-std=c++20", "-DC10_USING_CUSTOM_GENERATED_MACROS", FOLDER / "cpp/run_pte.cpp", "-o", program]
    command += [*(f"-I{path}" for path in headers), *libraries, shared, "-Wl,--allow-shlib-undefined"]
    command += [f"-Wl,-rpath,{path.parent}" for path in (*libraries, shared)]
    subprocess.run([*map(str, command)], check=True)
    return program


@pytest.mark.parametrize("name", ["deploy_pte", "deploy_package"])
def test_what_deploys_imports_nothing_of_this_project(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported.isdisjoint({"quant2e", "quantizers", "lowering"})


def test_the_list_of_examples_is_complete():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| \[([\w.]+)\]", page, re.MULTILINE))
    assert listed == {path.name for path in FOLDER.glob("*.py")}
