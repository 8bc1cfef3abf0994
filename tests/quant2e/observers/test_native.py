"""The kernel gives the numbers of plain torch bit for bit, and its absence changes nothing."""

import math
import os
import subprocess
import sys

import pytest
import torch

from quant2e.observers.measuring import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver
from quant2e.observers.native.build import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler, so there is only plain torch")

OBSERVERS = [
    MinMaxObserver,
    lambda: MovingAverageMinMaxObserver(averaging_constant=0.3),
    lambda: HistogramObserver(bins=64),
    HistogramObserver,
]
NAN, INF = math.nan, math.inf


def batches(kind):
    g = torch.Generator().manual_seed(1)
    for i in range(4):
        n = (1, 31, 9000, 300_000)[(i + len(kind)) % 4]
        x = torch.randn(n, generator=g) * 10.0 ** (3 * i - 4)
        if kind == "relu":
            x = x.relu()
        elif kind == "odd":
            odd = torch.rand(n, generator=g) < 0.02
            x[odd] = torch.tensor([NAN, INF, -INF, -3e38])[torch.arange(int(odd.sum())) % 4]
        elif kind == "only odd":
            x = torch.tensor([NAN, -INF]) if i < 2 else x
        elif kind == "constant":
            x = torch.full((n,), 3.7)
        elif kind == "negative zero":
            x = torch.tensor([-0.0, 0.0])[torch.arange(n) % 2]
        elif kind == "vanishing":
            x = x * 1e-38
        elif kind == "huge":
            x = x * 1e20
        elif kind == "shifted":
            x = x * 1e-3 + 100
        elif kind == "half":
            x = x.clamp(-6e4, 6e4).half()
        elif kind == "bfloat16":
            x = x.bfloat16()
        elif kind == "channels last":
            x = torch.randn(2, 3, 5, 7, generator=g).to(memory_format=torch.channels_last)
        elif kind == "permuted":
            x = torch.randn(3, 4, 5, 6, generator=g).permute(2, 0, 3, 1)
        elif kind == "strided":
            x = torch.randn(2, 300, 400, generator=g)[:, ::2, 3:390].transpose(0, 2)
        elif kind == "expanded":
            x = torch.randn(1, 50, generator=g).expand(30, 50)
        elif kind == "empty":
            x = x[: n // 2 * (i % 2)]
        yield x


KINDS = (
    *("normal", "relu", "odd", "only odd", "constant", "negative zero", "vanishing", "huge", "shifted", "half"),
    *("bfloat16", "channels last", "permuted", "strided", "expanded", "empty"),
)


@pytest.mark.parametrize("make", OBSERVERS, ids=["minmax", "average", "histogram 64", "histogram"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_bit_equal(make, kind, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast, plain = make(), make()
        for x in batches(kind):
            fast(x)
            plain._update(x)
            for name, value in plain.named_buffers():
                assert repr(fast.get_buffer(name).tolist()) == repr(value.tolist()), name
    finally:
        torch.set_num_threads(before)


def test_inputs_are_not_written():
    x = torch.randn(100_000)
    kept = x.clone()
    HistogramObserver()(x)
    assert torch.equal(x, kept)


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_a_compiler_or_switched_off_there_is_plain_torch(tmp_path):
    ask = "from quant2e.observers.native import ops as native; print(native.load_ops())"
    assert run(ask, QUANT2E_NATIVE="0") == "None"
    assert run(ask, PATH="/nowhere", CXX="") == "None"


@pytest.mark.parametrize(
    "load", ["quant2e.observers.native.ops.load_ops", "lowering.inductor.kernels.weight_only.load_kernel"]
)
def test_a_compiler_that_fails_is_a_warning_with_its_own_words(tmp_path, load):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho a bad day >&2\nexit 1\n")
    broken.chmod(0o755)
    module, _, name = load.rpartition(".")
    ask = (
        f"import warnings; from {module} import {name}\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        f"    assert {name}() is None\n"
        "print(*[entry.message for entry in seen if entry.category is RuntimeWarning])"
    )
    assert "could not be built or loaded" in (
        said := run(ask, CXX=str(broken), QUANT2E_CACHE_DIR=str(tmp_path / "cache"))
    )
    assert "a bad day" in said


def test_it_is_built_once_and_importing_builds_nothing(tmp_path):
    cache = tmp_path / "cache"
    run("import quant2e, quant2e.observers.native.ops", QUANT2E_CACHE_DIR=str(cache))
    assert not cache.exists()
    load = "from quant2e.observers.native import ops as native; assert native.load_ops() is not None"
    run(load, QUANT2E_CACHE_DIR=str(cache))
    (built,) = cache.iterdir()
    made = built.stat().st_mtime_ns
    run(load, QUANT2E_CACHE_DIR=str(cache))
    assert [p.stat().st_mtime_ns for p in cache.iterdir()] == [made]


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    run(
        "from quant2e.observers.native import ops as native; assert native.load_ops() is not None",
        QUANT2E_CACHE_DIR=str(shared),
    )
    assert list(shared.iterdir()) == []
