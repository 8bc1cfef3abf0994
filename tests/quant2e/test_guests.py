"""Quantizers of torchao and ExecuTorch run here unmodified, and give the numbers of torchao's own flow, bit for bit."""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.quant2e.guest_runner import MODELS

RUNNER = Path(__file__).with_name("guest_runner.py")
GUESTS = {
    "torchao": ("x86 static", "x86 dynamic"),
    "executorch": ("xnnpack per tensor", "xnnpack per channel", "xnnpack dynamic"),
}
REFUSED = {
    # The guest's own matching raises on a module that is called twice, in torchao's flow as well.
    (guest, model): "partition has more than one output node"
    for guest in GUESTS["torchao"]
    for model in ("residual add in place", "cat of cat")
}
UNQUANTIZED = {("xnnpack dynamic", "conv1d")}


@cache
def results(library):
    """One process for each library: importing it changes global state."""
    if find_spec(library) is None or find_spec("torchao") is None:
        pytest.skip(f"{library} is not installed")
    run = subprocess.run(
        [sys.executable, str(RUNNER), library],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


CASES = [(library, guest, model) for library, guests in GUESTS.items() for guest in guests for model in MODELS]


@pytest.mark.parametrize(("library", "guest", "model"), [*CASES, ("torchao", "embedding", "embedding")])
def test_bit_equal_to_the_guests_own_flow(library, guest, model):
    found = results(library)[f"{guest}: {model}"]
    if (guest, model) in REFUSED:
        assert REFUSED[guest, model] in found["theirs"]
        assert found["ours"] == found["theirs"]
        return
    assert found["ours"] == ""
    assert found["theirs"] == ""
    assert found["difference"] == 0.0
    assert found["equal"]
    assert (found["quantized"] == 0) == ((guest, model) in UNQUANTIZED)


@pytest.mark.slow
def test_the_table_of_docs_is_true():
    """docs/guests.md lists every quantizer class of the installed sources, and says which import."""
    if find_spec("executorch") is None or find_spec("torchao") is None:
        pytest.skip("torchao or executorch is not installed")
    survey = RUNNER.with_name("guest_survey.py")
    run = subprocess.run([sys.executable, str(survey)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    page = (RUNNER.parents[2] / "docs" / "guests.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith(("| torchao: ", "| executorch: "))]
    told = [(name.removeprefix("| "), imported.removeprefix("no: ")) for name, imported in rows]
    assert told == [
        (f"{name.partition('.')[0]}: {name.rpartition('.')[2]}", error.replace("|", " ") or "yes")
        for name, error in found.items()
    ]
