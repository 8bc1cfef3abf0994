"""``quant2e bench``: what it measures, what it prints, and what it says when a file cannot be timed."""

import os
import re
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lowering.bench.command
from lowering.bench.command import Row, bench, table
from lowering.bench.inputs import OwnInputs, chosen
from lowering.bench.worker import Footprint, in_child, measure_times
from lowering.files.program_file import open_program, read_arrays
from lowering.signature import TensorInput
from quant2e.cli import main
from quant2e.errors import FileFormatError, LoweringError


@pytest.fixture(scope="module")
def pt2(tmp_path_factory):
    path = tmp_path_factory.mktemp("programs") / "double.pt2"
    torch.export.save(torch.export.export(nn.Softplus(), (torch.randn(2, 3),)), path)
    return path


@pytest.fixture
def here(monkeypatch):
    """Everything in this process, which is where a test wants to look."""
    monkeypatch.setattr(lowering.bench.command, "in_child", lambda function, *args: function(*args))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_program_file_runs_on_its_own_inputs(pt2):
    program = open_program(pt2)
    (x,) = program.tensors()
    (y,) = program.run([x])
    torch.testing.assert_close(y, nn.functional.softplus(x))


def test_rounds_are_interleaved_and_as_many_as_asked(pt2, here):
    one, other = measure_times([pt2, pt2], [None, None], None, 1, 7)
    assert len(one) == len(other) == 7
    assert min(one + other) > 0
    rows = bench([pt2, pt2], threads=[2, 1, 2], rounds=5)
    assert [list(row.medians) for row in rows] == [[2, 1], [2, 1]]
    assert rows[0].ratios == {2: 1.0, 1: 1.0}
    assert all(row.size == pt2.stat().st_size and row.footprint.load_ms > 0 for row in rows)


def test_the_table():
    rows = [
        Row(
            path=Path("a/float.pte"),
            size=4_000_000,
            footprint=Footprint(load_ms=12.34, peak_mb=9.0),
            medians={1: 2.5, 2: 1.5},
            ratios={1: 1.0, 2: 1.0},
        ),
        Row(
            path=Path("int8.pte"),
            size=1_050_000,
            footprint=Footprint(load_ms=3.0, peak_mb=4.56),
            medians={1: 1.25, 2: 1.0},
            ratios={1: 2.0, 2: 1.5},
        ),
    ]
    assert table(rows).splitlines() == [
        "program    size MB  load ms  peak MB  ms 1 thr  ratio 1 thr  ms 2 thr  ratio 2 thr",
        "float.pte     4.00     12.3      9.0     2.500         1.00     1.500         1.00",
        "int8.pte      1.05      3.0      4.6     1.250         2.00     1.000         1.50",
    ]


def test_arrays_are_read_in_order_and_pickles_are_not(tmp_path, pt2, here, capsys):
    path = tmp_path / "x.npz"
    np.savez(path, np.ones((2, 3), np.float32), np.arange(4))
    assert [x.dtype for x in read_arrays(path)] == [torch.float32, torch.int64]
    assert main(["bench", str(pt2), "--inputs", str(path), "--rounds", "1"]) == 1
    assert "double.pt2 takes 1 tensor(s), not 2: 'input 0': float32[2, 3]" in capsys.readouterr().err
    np.savez(path, np.ones((2, 4), np.float32))
    assert main(["bench", str(pt2), "--inputs", str(path), "--rounds", "1"]) == 1
    assert "takes 'input 0': float32[2, 3], not float32[2, 4]" in capsys.readouterr().err
    np.savez(path, np.array([lambda: 1], dtype=object)[:0].astype(object), allow_pickle=True)
    with pytest.raises(FileFormatError, match="is no (.npz file of plain arrays|array of plain numbers)"):
        read_arrays(path)


class Runs:
    """Pickles as a call of ``os.system``."""

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def test_opening_a_file_runs_nothing_of_it(tmp_path, pt2):
    witness, path = tmp_path / "witness", tmp_path / "evil.pt2"
    runs = Runs()
    runs.witness = witness
    torch.save(runs, tmp_path / "pickle")
    with zipfile.ZipFile(pt2) as old, zipfile.ZipFile(path, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            new.writestr(name.replace(root, "evil", 1), old.read(name))
        new.writestr("evil/data/weights/extra.pt", (tmp_path / "pickle").read_bytes())
    with pytest.raises(FileFormatError):
        open_program(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.pt2", b"no archive", r"model.pt2 is not a .pt2 file"),
        ("model.pte", b"no program", r"model.pte is not a program of ExecuTorch"),
    ],
)
def test_what_is_no_program(tmp_path, here, capsys, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    assert main(["bench", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(said, captured.err), captured.err
    assert captured.err.startswith("quant2e bench: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench"], "Missing argument 'PROGRAM...'"),
        (["bench", str(Path(__file__)), "--rounds", "1"], "does not end in .pte or .onnx or .xml or .pt2"),
        (["bench", "a.pte", "--threads", "1,x"], "'x' is not a positive whole number"),
        (["bench", "a.pte", "--rounds", "0"], "0 is not in the range x>=1"),
        (["bench", "none.pte"], "there is no file none.pte"),
        (["benhc"], "No such command 'benhc'"),
    ],
)
def test_arguments_that_are_wrong(capsys, arguments, said):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    assert main(["bench", "--help"]) == 0
    assert "quant2e bench model_float.pte model_int8.pte --threads 1,2" in capsys.readouterr().out


class Double(nn.Module):
    def forward(self, x):
        return x + x


def export_of(path, batch, **dims):
    shapes = ({0: torch.export.Dim("n", **dims)},) if dims else None
    torch.export.save(torch.export.export(Double(), (torch.full((batch, 3), 0.5),), dynamic_shapes=shapes), path)
    return path


def test_programs_are_timed_on_the_same_inputs(tmp_path, here):
    """Ratios of times on other inputs compare nothing. The first of two models takes 4 samples, and the other any."""
    fixed, varying = export_of(tmp_path / "fixed.pt2", 4), export_of(tmp_path / "varying.pt2", 2, min=1, max=32)
    for programs in ([fixed, varying], [varying, fixed]):
        rows = bench(programs, rounds=1)
        assert [row.footprint.inputs for row in rows] == ["float32[4, 3]"] * 2
        assert table(rows).splitlines()[-1] == "run on float32[4, 3]"
    other = export_of(tmp_path / "other.pt2", 5)
    rows = bench([fixed, other], rounds=1)
    assert table(rows).splitlines()[-3:] == [
        "no inputs of one program are taken by all, so that each ran on its own, and times do not compare (--inputs):",
        "  fixed.pt2 on float32[4, 3]",
        "  other.pt2 on float32[5, 3]",
    ]


def test_those_that_a_model_was_exported_with_come_before_noise_and_little_noise_before_much(tmp_path):
    def own(name, size, low=1, high=32):
        takes = (TensorInput(name="x", dtype=torch.float32, sizes=((low, high), (3, 3))),)
        found = {"takes": takes, "dtypes": (torch.float32,), "shapes": ((size, 3),)}
        return OwnInputs(file=Path(f"{name}.pt"), program=Path(name), **found)

    pte, onnx, pt2, narrow = own("a.pte", 32), own("b.onnx", 1), own("c.pt2", 2), own("d.onnx", 8, 8, 8)
    assert chosen([pte, onnx, pt2]) == [Path("c.pt2.pt")] * 3
    assert chosen([pte, onnx]) == [Path("b.onnx.pt")] * 2
    assert chosen([pte, onnx, pt2, narrow]) == [Path("d.onnx.pt")] * 4
    assert chosen([narrow, own("e.onnx", 4, 4, 4)]) == [Path("d.onnx.pt"), Path("e.onnx.pt")]


def die(*_):
    os._exit(3)


def test_a_process_that_dies_is_told(pt2):
    with pytest.raises(
        LoweringError, match=r"the process that ran .*double.pt2 ended without an answer \(exit code 3\)"
    ):
        in_child(die, pt2)


def crash(*_):
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_file_that_crashes_its_runtime_is_named(pt2):
    with pytest.raises(FileFormatError, match=r"the process that ran .*double.pt2 was ended by SIGSEGV: damaged"):
        in_child(crash, (pt2,))


@pytest.mark.slow
def test_programs_for_the_runtime_and_for_torch_side_by_side(tmp_path, pt2, capsys):
    pytest.importorskip("executorch")
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    path = tmp_path / "model.pte"
    lowering.to_executorch(module, (torch.randn(2, 3),), verify=False).save(path)
    assert main(["bench", str(path), str(pt2), "--rounds", "3", "--threads", "1"]) == 0
    head, first, second, on = [line for line in capsys.readouterr().out.splitlines() if line]
    assert head.split() == ["program", "size", "MB", "load", "ms", "peak", "MB", "ms", "1", "thr", "ratio", "1", "thr"]
    assert first.split()[0] == "model.pte"
    assert float(first.split()[-1]) == 1.0
    assert second.split()[0] == "double.pt2"
    assert on == "run on float32[2, 3]"
    assert main(["bench", str(path), "--method", "encode"]) == 1
    assert "no method 'encode'; its methods are forward: choose one with --method" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:200])
    assert main(["bench", str(path)]) == 1
    assert "model.pte is damaged: what is left of its checksum cannot be read" in capsys.readouterr().err
