"""Importing a package changes nothing that belongs to the process, and loads nothing that is optional."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = Path(__file__).with_name("import_probe.py")
ROOT = PROBE.parents[1]

OPTIONAL = {
    "coremltools",
    "executorch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "rich",
    "sklearn",
    "torchao",
    "transformers",
}

HEAVY = ("sympy", "mpmath", "torch._dynamo", "torch._inductor", "torch.onnx", "torch.fx.experimental.symbolic_shapes")
"""What takes long to load, and no user of every name needs: functions import it."""

LOADED = (
    "import json, sys, torch\nwith_torch = set(sys.modules)\nimport {}\n"
    "print(json.dumps([*{{*sys.modules}} - with_torch]))"
)

PATCHES_EVERYTHING = """
import logging, os, random, sys, warnings
import numpy, torch, torch._inductor.config, torch._dynamo.config
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
torch.manual_seed(1)
torch.set_num_threads(torch.get_num_threads() + 1)
torch.backends.cudnn.benchmark = True
torch._inductor.config.freezing = not torch._inductor.config.freezing
torch._dynamo.config.suppress_errors = not torch._dynamo.config.suppress_errors
from torch._inductor.fx_passes import quantization
quantization._register_woq_lowerings()
torch.nn.Module.train = lambda self, mode=True: self
numpy.random.seed(1)
random.seed(1)
warnings.simplefilter("ignore")
logging.getLogger("torch").setLevel(logging.ERROR)
os.environ["OMP_NUM_THREADS"] = "7"
sys.setrecursionlimit(54321)
"""


def probe(package: str, path: Path = ROOT) -> dict[str, list[str]]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, str(PROBE), package], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(params=["quant2e", "quantizers", "lowering"])
def package(request):
    return request.param


def test_importing_changes_nothing(package):
    found = probe(package)
    assert found["changed"] == []
    assert package in found["loaded"]
    assert OPTIONAL & set(found["loaded"]) == set()


def test_importing_is_quick(package):
    """What is not loaded costs no time, on any machine: beyond ``import torch``, our own files and a few small ones."""
    command = [sys.executable, "-c", LOADED.format({"quant2e": "quant2e.interface"}.get(package, package))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    loaded = json.loads(done.stdout)
    ours = [name for name in loaded if name.split(".")[0] in {"quant2e", "quantizers", "lowering"}]
    assert package in ours
    assert [name for name in loaded if any(name == heavy or name.startswith(heavy + ".") for heavy in HEAVY)] == []
    assert {name.split(".")[0] for name in set(loaded) - set(ours)} - {"torch", *sys.stdlib_module_names} == set()


def test_importing_the_core_waits_for_torch_until_a_name_is_used():
    code = "import sys, quant2e\nprint('torch' in sys.modules, quant2e.__version__)\nprint(quant2e.quantize.__name__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    first, second = done.stdout.splitlines()
    assert first.split()[0] == "False"
    assert second == "quantize"


def test_the_probe_sees_what_a_package_changes(tmp_path):
    (tmp_path / "patches_everything").mkdir()
    (tmp_path / "patches_everything" / "__init__.py").write_text("")
    (tmp_path / "patches_everything" / "inner.py").write_text(PATCHES_EVERYTHING)
    assert probe("patches_everything", tmp_path)["changed"] == [
        "default dtype",
        "dynamo config",
        "environment",
        "grad mode",
        "inductor config",
        "inductor passes",
        "loggers",
        "nn.Module",
        "numpy RNG",
        "python RNG",
        "recursion limit",
        "torch RNG",
        "torch threads",
        "torch.backends",
        "warnings filters",
    ]
