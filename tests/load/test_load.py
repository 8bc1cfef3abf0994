"""Under load: a decoder of a billion parameters, thousands of nodes and batches, each in a process of its own.

Eight threads at once are in ``tests/test_threads.py``; what was measured is in ``docs/proof.md``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(module, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.load.{module}", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def memory_is_there(gigabytes):
    if not Path("/proc/meminfo").exists():
        pytest.skip("resident memory is read from /proc, which is not here")
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    free = int(lines["MemAvailable"].split()[0]) / 2**20
    if free < gigabytes:
        pytest.skip(f"{free:.0f} GB of memory are free, and this takes {gigabytes}")


@pytest.mark.slow
def test_a_decoder_of_a_billion_parameters():
    memory_is_there(7)
    found = run("decoder", "--layers", 15, "--width", 2048)
    assert found["weights"] >= 4e9
    assert found["quantized"] <= 0.3 * found["weights"]
    assert found["sqnr_db"] >= 30
    assert found["peak"] - found["before"] <= 1.3 * found["weights"]


@pytest.mark.slow
def test_weights_in_files_take_the_memory_of_their_integers_and_one_layer(tmp_path):
    """And pages of the file that they are saved to, which the system may drop."""
    memory_is_there(2)
    sizes = ("--layers", 6, "--width", 1024, "--files", tmp_path)
    run("decoder", *sizes, "--write")
    found = run("decoder", *sizes, "--save", tmp_path / "x.pt2")
    allowed = found["quantized"] + found["largest"] + found["weights"] / 4  # what the allocator keeps of freed layers
    assert found["made"] - found["before"] <= 5e6
    assert found["peak"] - found["before"] <= allowed < 0.65 * found["weights"]
    assert found["peak_saved"] - found["peak"] <= 1.25 * found["quantized"]


@pytest.mark.slow
def test_five_thousand_nodes():
    found = run("many", "nodes", "--count", 1250)
    assert found["nodes"] >= 5000
    assert found["quantized"] >= 1250


@pytest.mark.slow
def test_ten_thousand_batches_take_the_memory_of_a_thousand():
    memory_is_there(2)
    resident = run("many", "batches", "--count", 10_000)["resident"]
    assert len(resident) == 10
    assert resident[-1] - resident[0] <= 8 * 2**20
