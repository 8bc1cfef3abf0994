"""What a wheel does where torch alone is installed: quantize, save, load, inspect, compile; and what it says of extras.

Run by `build_and_try.py` with the Python of a clean environment, in an empty folder.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lowering
import quant2e
import quantizers
from lowering.executorch.runtime import require_executorch
from lowering.native.kernels.op import instruction_set
from lowering.native.kernels.shipped import able, shipped
from quant2e.documents.yaml_text import yaml_text
from quant2e.observers.native.build import built

PACKAGES = (quant2e, quantizers, lowering)
OF_EXTRAS = ("executorch", "hypothesis", "matplotlib", "onnx", "onnxruntime", "optuna", "PIL", "rich", "scipy", "yaml")


def main() -> None:
    folders = [Path(str(package.__file__)).parent for package in PACKAGES]
    assert all(sys.prefix in str(folder) for folder in folders), folders
    there = [name for name in OF_EXTRAS if importlib.util.find_spec(name)]
    assert not there, f"the environment is not clean: {there}"
    modules = imported()
    tell(f"torch {torch.__version__}, quant2e {quant2e.__version__}: {modules} modules imported, no extra installed")

    assert all((folder / "py.typed").is_file() for folder in folders)
    sources = sorted(path.name for folder in folders for path in folder.rglob("*.cpp"))
    assert {"lanes.cpp", "native.cpp", "native_kernel.cpp", "native_op.cpp", "region.cpp", "weight_only.cpp"} <= {
        *sources
    }
    assert all((folders[0] / "page" / name).is_file() for name in ("page.html", "page.css", "page.js"))
    tell(f"py.typed in all three packages, the page's template, and {len(sources)} sources of kernels")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    example, data = (torch.randn(2, 3, 8, 8),), [(torch.randn(2, 3, 8, 8),) for _ in range(4)]
    quantizer = quantizers.X86InductorQuantizer().set_global("w8a8")
    result = quant2e.quantize(model, example, quantizer, calibration_data=data, progress=False)
    quant2e.save(result, "model.pt2")
    assert torch.equal(quant2e.load("model.pt2")(*example), result(*example))
    tell("quantized, saved and loaded with equal outputs")

    seen = command("inspect", "model.pt2", "--json")
    assert json.loads(seen), seen
    tell("quant2e inspect --json reads the file; quant2e --version: " + command("--version").strip())

    program = lowering.to_native(result, progress=False)
    brought = shipped(instruction_set()) if instruction_set() else None
    assert brought is not None or not able(), "the wheel brings no library of int8 regions"
    tell(f"{brought.name if brought else 'no library came with the wheel'}: {program.report}")

    if shutil.which("g++") or shutil.which("clang++"):
        assert built(folders[0] / "observers" / "native" / "native.cpp") is not None
        program = lowering.to_inductor(result, progress=False)
        tell(f"compiled by Inductor: {program.verification}")
    for extra, use in {
        "onnx": lambda: lowering.to_onnx(result, path="a.onnx"),
        "executorch": require_executorch,
        "yaml": lambda: yaml_text({}),
    }.items():
        told = error_of(use)
        assert f"quant2e[{extra}]" in told, told
    np.savez("x.npz", x=np.zeros((2, 3, 8, 8), np.float32))
    told = command("quantize", "model.pt2", "--data", "x.npz", "-o", "y.pt2", "--html", "p.html", code=2)
    assert "pip install quant2e[html]" in told, told
    tell("what needs onnx, executorch, yaml or html says which extra to install")


def imported() -> int:
    """Import every module of the packages; returns their number."""
    names = [
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        if not module.name.endswith("__main__")
    ]
    for name in names:
        importlib.import_module(name)
    return len(names)


def command(*arguments: str, code: int = 0) -> str:
    """What ``quant2e`` writes. It has to leave with ``code``."""
    script = Path(sys.executable).with_name("quant2e")
    done = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout + (done.stderr if code else "")


def error_of(use: Callable[[], object]) -> str:
    """The message with which a call fails."""
    try:
        use()
    except (quant2e.Quant2eError, ImportError) as error:
        return str(error)
    raise AssertionError("it did not fail")


def tell(line: str) -> None:
    print(f"ok  {line}", flush=True)


if __name__ == "__main__":
    main()
