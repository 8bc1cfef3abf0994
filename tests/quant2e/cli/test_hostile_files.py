"""``inspect`` of damaged and hostile files: a sentence and exit code 1, or what is still to be read; nothing else.

Damage is the same in every run. Files of ExecuTorch, onnxruntime and OpenVINO are made once; packages, which are
compiled for that, by the slow test.
"""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import quant2e

MADE: dict[str, tuple[str, str]] = {
    ".pte": ("executorch", "to_executorch"),
    ".onnx": ("onnx", "to_onnx"),
    ".xml": ("openvino", "to_openvino"),
}


@pytest.fixture(scope="session")
def programs(folder: Path, quantized: Path) -> Callable[[str], Path]:
    """The file with a suffix, made of the quantized model when it is first asked for."""

    def made(suffix: str) -> Path:
        if suffix == ".pt2":
            return quantized
        needed, lower = MADE[suffix]
        pytest.importorskip(needed)
        import lowering

        path = folder / f"program{suffix}"
        if not path.exists():
            model = quant2e.load(quantized)
            if suffix == ".onnx":
                lowering.to_onnx(model, path=path, verify=False)
            else:
                getattr(lowering, lower)(model, verify=False).save(path)
        return path

    return made


def damaged(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """``count`` files that ``data`` becomes: cut short, with bits flipped, blocks overwritten, or bytes put in."""
    pick = random.Random(seed)
    yield "nothing", b""
    yield "one byte", data[:1]
    for number in range(count):
        at = pick.randrange(len(data))
        kind = ("flip", "flip", "flip", "cut", "zeros", "ones", "noise", "insert", "end")[number % 9]
        width = pick.choice((1, 4, 8, 64))
        block = {"zeros": bytes(width), "ones": b"\xff" * width, "noise": pick.randbytes(width)}
        if kind == "flip":
            found = bytearray(data)
            found[at] ^= 1 << pick.randrange(8)
        elif kind == "cut":
            found = bytearray(data[:at])
        elif kind == "insert":
            found = bytearray(data[:at] + pick.randbytes(width) + data[at:])
        elif kind == "end":
            found = bytearray(data + pick.randbytes(width))
        else:
            found = bytearray(data)
            found[at : at + width] = block[kind]
        yield f"{kind} at {at}", bytes(found)


def check(run: Callable[..., object], path: Path, what: str) -> int:
    """Inspect ``path``; returns the exit code. ``run`` raises what is no `SystemExit`."""
    result = run("inspect", path, "--json")
    assert result.exit_code in (0, 1), (what, result.output)  # type: ignore[attr-defined]
    if result.exit_code == 1:  # type: ignore[attr-defined]
        said = result.stderr.strip()  # type: ignore[attr-defined]
        assert said.startswith("quant2e inspect: "), (what, said)
        assert "Traceback" not in said, (what, said)
    return int(result.exit_code)  # type: ignore[attr-defined]


@pytest.mark.parametrize("suffix", [".pt2", *MADE])
def test_damage(run, programs, suffix, tmp_path):
    original = programs(suffix)
    if suffix == ".xml":
        shutil.copy(original.with_suffix(".bin"), tmp_path / "x.bin")
    refused = 0
    for what, data in damaged(original.read_bytes(), 120, seed=len(suffix)):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(data)
        refused += check(run, path, what)
    assert refused > 60  # files of ours carry a checksum


@pytest.mark.parametrize("suffix", MADE)
def test_damage_to_files_of_others(run, programs, suffix, tmp_path):
    """Without our checksum nothing is known to be damaged: each is read as far as it goes."""
    original = programs(suffix).read_bytes()
    if suffix == ".xml":
        shutil.copy(programs(suffix).with_suffix(".bin"), tmp_path / "x.bin")
    stripped = original.replace(b"quant2e", b"another")
    for what, data in damaged(stripped, 120, seed=7 + len(suffix)):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(data)
        check(run, path, what)


@pytest.mark.parametrize("suffix", [".pte", ".onnx", ".xml", ".pt2"])
def test_files_of_another_kind(run, programs, suffix, tmp_path, folder):
    others = [folder / "calib.npz", folder / "model.pt2", *(programs(other) for other in (".pt2", *MADE))]
    for other in others:
        if other.suffix == suffix:
            continue
        path = tmp_path / f"x{suffix}"
        shutil.copy(other, path)
        check(run, path, f"{other.name} as {suffix}")


def archive(members: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return held.getvalue()


def test_names_that_lead_out_of_an_archive(run, quantized, tmp_path):
    with zipfile.ZipFile(quantized) as given:
        members = {name: given.read(name) for name in given.namelist()}
    root = next(iter(members)).split("/")[0]
    for name in (f"{root}/../../escaped", "/tmp/escaped_quant2e", "..\\escaped", f"{root}/models/../../../escaped"):
        path = tmp_path / "inner" / "x.pt2"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(archive({**members, name: b"x"}))
        check(run, path, name)
        assert {one.name for one in tmp_path.iterdir()} == {"inner"}
        assert [one.name for one in path.parent.iterdir()] == ["x.pt2"]
    assert not Path("/tmp/escaped_quant2e").exists()


LIMITED = """
import resource, sys
import torch
resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
from quant2e.cli.verbs import group
group(["inspect", *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("where", ["first", "all"])
def test_an_archive_that_grows(quantized, tmp_path, where):
    """Eight gigabytes of zeros in eight megabytes: refused, in less memory than that."""
    with zipfile.ZipFile(quantized) as given:
        members = {name: given.read(name) for name in given.namelist()}
    path = tmp_path / "x.pt2"
    large = next(iter(members)) if where == "first" else None
    zeros = bytes(1 << 24)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        for name, data in members.items():
            if large not in (None, name):
                made.writestr(name, data)
                continue
            with made.open(name, "w", force_zip64=True) as member:
                for _ in range(512 // (1 if large else len(members))):
                    member.write(zeros)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-500:]
    assert done.stderr.strip().splitlines()[-1].startswith("quant2e inspect: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_damage_to_a_package(run, quantized, tmp_path):
    import lowering

    original = tmp_path / "aot.pt2"
    lowering.package_inductor(quant2e.load(quantized), path=original, verify=False)
    for what, data in damaged(original.read_bytes(), 300, seed=5):
        path = tmp_path / "x.pt2"
        path.write_bytes(data)
        check(run, path, what)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pte", ".onnx"])
def test_bench_of_damage(run, programs, suffix, tmp_path):
    """A runtime that a file of others crashes is a process of its own: the command line says so, and goes on."""
    stripped = programs(suffix).read_bytes().replace(b"quant2e", b"another")
    for what, data in damaged(stripped, 25, seed=3):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(data)
        result = run("bench", path, "--rounds", "1")
        assert result.exit_code in (0, 1), what
        assert result.exit_code == 0 or result.stderr.strip().splitlines()[-1].startswith("quant2e bench: "), what
