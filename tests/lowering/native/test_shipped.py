"""Libraries that a wheel brings: they are found, run without a compiler, and where one does not load it is said."""

import os
import subprocess
import sys
import textwrap

import pytest

from lowering.native.kernels import op
from lowering.native.kernels.shipped import COMMON, FLAGS, able, ship, shipped
from quant2e.observers.native.build import compiler

pytestmark = pytest.mark.skipif(compiler() is None or not able(), reason="a wheel brings none on such a machine")


QUICK = ("-O0", *COMMON[1:])
"""What takes a quarter of the time to compile."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The library for plain C++, not optimized."""
    made = tmp_path_factory.mktemp("shipped")
    with pytest.MonkeyPatch.context() as patch:
        _compile_quickly(patch)
        (path,) = ship(["plain"], compiler(), made)
    assert path.parent == made
    return made


def _compile_quickly(patch):
    patch.setattr("lowering.native.kernels.shipped.COMMON", QUICK)
    patch.setitem(FLAGS, "plain", ())


@pytest.fixture
def there(folder, monkeypatch):
    monkeypatch.delenv("QUANT2E_NATIVE_FLAGS", raising=False)  # of sanitizers: what was shipped has none
    monkeypatch.setattr("lowering.native.kernels.shipped.FOLDER", folder)
    _compile_quickly(monkeypatch)
    return shipped("plain")


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Where a library that is compiled here would be: none is."""
    path = tmp_path / "compiled.so"
    monkeypatch.setattr(op, "built_together", lambda *_: path)
    return path


def test_a_checkout_has_none_and_compiles():
    assert shipped("plain") is None


def test_it_is_taken(there, monkeypatch):
    assert op.built_library("plain") == there
    monkeypatch.setenv("QUANT2E_NATIVE", "0")
    assert op.built_library("plain") is None


def test_other_flags_or_sources_are_another_library(there, compiled, monkeypatch):
    assert op.built_library("plain") == there
    monkeypatch.setenv("QUANT2E_NATIVE_FLAGS", "-g0")
    assert op.built_library("plain") == compiled
    monkeypatch.setattr("lowering.native.kernels.shipped.COMMON", ("-O1",))
    assert shipped("plain") is None


def test_one_that_does_not_load_is_told_and_compiled(there, compiled, tmp_path, monkeypatch):
    (tmp_path / there.name).write_bytes(b"not a library")
    monkeypatch.setattr("lowering.native.kernels.shipped.FOLDER", tmp_path)
    with pytest.warns(RuntimeWarning, match="could not be built or loaded.*It is compiled here"):
        assert op.built_library("plain") == compiled


def test_it_runs_without_a_compiler(there, folder, tmp_path):
    script = """
        import sys
        from pathlib import Path
        import torch
        from lowering.native.kernels import shipped
        shipped.FOLDER, shipped.COMMON, shipped.FLAGS["plain"] = Path(sys.argv[1]), tuple(sys.argv[2:]), ()
        from lowering import to_native
        from quant2e import quantize
        from quant2e.observers.native.build import compiler
        from quantizers import X86InductorQuantizer

        assert compiler() is None
        torch.manual_seed(0)
        x = torch.randn(4, 8)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
        program = to_native(quantize(model, (x,), X86InductorQuantizer().set_global("w8a8"), [(x,)]), (x,))
        print(program.report.verification.passed, len(program.report.regions))
    """
    left = {name: value for name, value in os.environ.items() if name != "CXX"}
    environment = {**left, "PATH": "", "QUANT2E_CACHE_DIR": str(tmp_path), "QUANT2E_NATIVE_ISA": "plain"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(folder), *QUICK],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "True 1\n", done.stderr
