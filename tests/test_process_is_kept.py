"""Nothing of the process changes by a public call: see ``process_state.py`` for what belongs to it.

Each call is made twice in a fresh process. What torch and the runtimes start on their first use, and nobody can undo,
is listed here, once, with the reason; the second call changes nothing at all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("public_calls.py")
ROOT = SCRIPT.parents[1]

TRACE = {"loggers": "torch's trace log drops its handler when it finds that it has nowhere to write to"}
INDUCTOR = {
    **TRACE,
    "inductor passes": "Inductor makes its tables of patterns when it first compiles",
    "python threads": "Inductor compiles C++ in a pool of threads, which wait for more work",
    "path": "setuptools, which Inductor asks for compiler flags, adds the packages that it brings with it",
}
FIRST_TIME = {
    "capture": TRACE,
    "capture that fails": TRACE,
    "quantize": TRACE,
    "prepare, calibrate, convert": TRACE,
    "prepare, train, convert": TRACE,
    "calibrate, compiled": {
        **INDUCTOR,
        "nn.Module": "torch.compile marks modules as they are made, and puts its own constructor there to do so",
    },
    "check_data": TRACE,
    "statistics": TRACE,
    "save and load": TRACE,
    "to_integer": TRACE,
    "to_inductor": INDUCTOR,
    "package_inductor": INDUCTOR,
    "to_executorch": TRACE,
    "to_onnx": TRACE,
    "to_native": TRACE,
    "to_openvino": {**TRACE, "python threads": "openvino's own telemetry starts one where openvino is imported"},
    "bench": {
        "children": "programs run in processes of a fork server of multiprocessing, which ends with the process",
        "descriptors": "the pipes to it and to multiprocessing's resource tracker",
    },
}
"""What the first call of a kind may change, and why that stays."""

IN_ONE_PROCESS = (
    "capture",
    "capture that fails",
    "quantize",
    "prepare, calibrate, convert",
    "prepare, train, convert",
    "check_data",
    "statistics",
    "save and load",
    "to_integer",
)
NEEDED = {"to_executorch": "executorch", "to_onnx": "onnxruntime", "to_openvino": "openvino"}


def changes(folder, *names):
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found):
    for name, (first, second) in found.items():
        assert {what: how for what, how in first.items() if what not in FIRST_TIME[name]} == {}, name
        assert second == {}, name


def test_calls_that_quantize_change_nothing_of_the_process(tmp_path):
    check(changes(tmp_path, *IN_ONE_PROCESS))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_TIME)
def test_no_call_changes_the_process(name, tmp_path):
    if (package := NEEDED.get(name)) and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    check(changes(tmp_path, name))
