"""Quantizers of torchao and ExecuTorch run here unmodified, and give the numbers of torchao's own flow, bit for bit."""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.quant2e.guest_runner import MODELS, RARE

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
OTHERS = {
    "arm static": (5, 8, 2, 0, 0, 4),
    "arm dynamic": (5, 8, 2, 0, 0, 4),
    "xpu": (5, 8, 2, 4, 0, 4),
    "composable": (5, 8, 2, 4, 0, 4),
    "coreml": (7, 20, 3, 5, 3, 5),
    "example": (7, 14, 3, 0, 0, 6),
    "enn": (8, 26, 8, 5, 4, 5),
    "vulkan": (0, 4, 1, 0, 0, 2),
    "vulkan dynamic": (0, 8, 2, 0, 0, 4),
    "cadence Default": (10, 22, 4, 9, 4, 8),
    "cadence Nop": (0, 0, 0, 0, 0, 0),
    "cadence RmsNormNop": (0, 0, 0, 0, 0, 0),
    "cadence WithLayerNorm": (10, 22, 6, 9, 4, 8),
    "cadence WakeWord": (11, 24, 4, 9, 4, 8),
    "cadence FusedConvRelu": (9, 24, 4, 7, 4, 8),
    "cadence W8A32Mixed": (0, 0, 0, 0, 6, 4),
    "cadence WithSoftmax": (10, 22, 6, 9, 4, 8),
    "cadence With16BitLinearActivations": (0, 16, 4, 0, 0, 8),
    "cadence With16BitConvActivations": (8, 0, 0, 8, 4, 0),
    "cadence With16BitMatmulActivations": (0, 6, 0, 0, 0, 0),
}
"""Dequantize ops of the other quantizers on each of `RARE`. Two of Cadence's quantize nothing, by design."""


@cache
def results(library):
    """One process for each library: importing it changes global state."""
    needed = ("executorch", "torchao", "coremltools") if library == "others" else (library, "torchao")
    if missing := [name for name in needed if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed")
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
    assert found["parameters"]
    assert (found["quantized"] == 0) == ((guest, model) in UNQUANTIZED)


@pytest.mark.slow
@pytest.mark.parametrize("guest", OTHERS)
def test_the_other_quantizers_too(guest):
    for model, count in zip(RARE, OTHERS[guest], strict=True):
        found = results("others")[f"{guest}: {model}"]
        equal = {"equal": True, "parameters": True, "difference": 0.0}
        assert found == {"ours": "", "theirs": "", "quantized": count, **equal}, model


@pytest.mark.slow
def test_every_guest_that_imports_is_run():
    others = {key.partition(":")[0] for key in results("others")}
    assert others == set(OTHERS)


@pytest.mark.slow
def test_the_table_of_docs_is_true():
    """docs/guests.md lists every quantizer class of the installed sources, and says which import."""
    if find_spec("executorch") is None or find_spec("torchao") is None:
        pytest.skip("torchao or executorch is not installed")
    script = RUNNER.with_name("list_guests.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    page = (RUNNER.parents[2] / "docs" / "guests.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith(("| torchao: ", "| executorch: "))]
    told = [(name.removeprefix("| "), imported.removeprefix("no: ")) for name, imported in rows]
    assert told == [
        (f"{name.partition('.')[0]}: {name.rpartition('.')[2]}", error.replace("|", " ") or "yes")
        for name, error in found.items()
    ]
