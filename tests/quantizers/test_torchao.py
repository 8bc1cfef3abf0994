"""Our quantizers in torchao's prepare and convert: the same scales and the same results as in our own flow."""

import builtins
import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from quant2e import Quant2eError
from quantizers import as_torchao
from tests.quantizers.conformance.broken import Sound

RUNNER = Path(__file__).with_name("torchao_runner.py")
NETS = ("conv bn relu", "residual add", "cat", "cat of one tensor", "adaptive pool", "linear without bias")
QUANTIZED = {
    "XNNPACK": (5, 7, 9, 6, 7, 5),
    "XNNPACK, dynamic": (4, 4, 6, 4, 4, 4),
    "x86": (4, 5, 8, 5, 6, 4),
    "int32 bias": (7, 9, 12, 8, 4, 0),
}
"""Dequantize ops in torchao's graph, for each net; the last quantizer has no rule for linear."""


@cache
def results():
    """In a process of its own, since importing torchao changes global state."""
    if find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(RUNNER)], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantizer", "net", "count"),
    [(name, net, count) for name, counts in QUANTIZED.items() for net, count in zip(NETS, counts, strict=True)],
)
def test_bit_equal_to_our_own_flow(quantizer, net, count):
    found = results()[f"{quantizer}: {net}"]
    assert found == {"ours": "", "theirs": "", "equal": True, "scales": True, "quantized": count}


@pytest.mark.slow
def test_scales_in_groups():
    found = results()["XNNPACK, groups: wide"]
    assert found == {"ours": "", "theirs": "", "equal": True, "scales": True, "quantized": 2}


def test_without_torchao_it_says_what_to_install(monkeypatch):
    imported = builtins.__import__

    def without(name, *rest, **options):
        if name.startswith("torchao"):
            raise ImportError(name)
        return imported(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Quant2eError, match=r"pip install quant2e\[torchao\]"):
        as_torchao(Sound())
