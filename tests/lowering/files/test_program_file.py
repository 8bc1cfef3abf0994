"""Program files: damage is told before a runtime sees it, and files of others run in a process of their own."""

import os
import random
import re
import signal
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from lowering import check_file, open_program, to_executorch, to_onnx
from lowering.executorch.pte import check_structure
from lowering.files.program_file import read_program
from lowering.inductor.package_file import archive, finished
from quant2e import capture, save
from quant2e.checksum import BLANK, WORD
from quant2e.errors import FileFormatError, LoweringError, Quant2eError
from quant2e.storage.inductor_package import PackageRecord

X = (torch.linspace(-1, 1, 6).reshape(2, 3),)


class Net(nn.Module):
    """Where a user's source line would be in a file, if one held it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        return torch.relu(self.linear(x)) + 1


@pytest.fixture(scope="module")
def pte(tmp_path_factory):
    pytest.importorskip("executorch")
    path = tmp_path_factory.mktemp("files") / "model.pte"
    to_executorch(Net().eval(), X, verify=False).save(path)
    return path


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    to_onnx(Net().eval(), X, path=path, verify=False)
    return path


@pytest.fixture(params=["pte", "onnx"])
def file(request):
    return request.getfixturevalue(request.param)


def without_checksum(file, folder):
    """A file of the same program that somebody else could have made."""
    path = folder / f"foreign{file.suffix}"
    content = file.read_bytes()
    start = content.find(f"{WORD}:".encode())
    text = content[start : start + len(BLANK)]
    content = content.replace(text, b"x" * len(text)).replace(WORD.encode(), b"y" * len(WORD))
    path.write_bytes(content)
    return path


def test_a_file_of_ours_runs_here_and_says_that_it_is_unchanged(file):
    assert check_file(file)
    program = open_program(file)
    assert (program.unchanged, program.isolated) == (True, False)
    (output,) = program.run(X)
    torch.testing.assert_close(output, Net()(*X))


def test_damage_is_found_before_a_runtime_sees_it(file, tmp_path):
    content, path, drawn = file.read_bytes(), tmp_path / file.name, random.Random(0)
    for _ in range(300):
        bit = drawn.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match="was damaged, or edited, since|is damaged|is not a program"):
            open_program(path)
    for length in [0, 3, 40, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(Quant2eError):
            open_program(path)


def test_no_path_of_this_machine_is_in_a_file(file):
    content = file.read_bytes()
    here = Path(__file__)
    for folder in (here.parent, Path.cwd(), Path.home(), Path(torch.__file__).parent):
        assert str(folder).encode() not in content
    assert here.name.encode() not in content


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((), "takes 1 tensor(s), not 0"),
        ((*X, *X), "takes 1 tensor(s), not 2"),
        ((X[0].double(),), "not float64[2, 3]"),
        ((X[0][0],), "not float32[3]"),
        (("text",), "not a str"),
        ((None,), "not a NoneType"),
        ((X,), "not a tuple"),
        (({"x": X[0]},), "not a dict"),
        ((X[0].to("meta"),), "not a tensor without data"),
        ((X[0].to_sparse(),), "not a tensor of layout sparse_coo"),
    ],
    ids=str,
)
def test_inputs_of_another_structure(file, values, said):
    with pytest.raises(LoweringError, match=re.escape(said)):
        open_program(file).run(values)


# -------------------------------------------------------------------------------------- a process of its own


@pytest.mark.slow
def test_a_file_of_others_runs_in_a_process_of_its_own(file, tmp_path):
    path = without_checksum(file, tmp_path)
    assert not check_file(path)
    program = open_program(path)
    assert (program.unchanged, program.isolated) == (False, True)
    ours = open_program(file)
    assert program.inputs == ours.inputs
    for _ in range(2):
        assert torch.equal(program.run(X)[0], ours.run(X)[0])
    with pytest.raises(LoweringError, match="takes 1 tensor"):
        program.run(())
    with pytest.raises(LoweringError):
        program.call([torch.zeros(7, dtype=torch.complex64)])
    with pytest.raises(LoweringError):
        program.call([torch.zeros(7)])
    assert torch.equal(program.run(X)[0], ours.run(X)[0])
    os.kill(program.call._process.pid, signal.SIGSEGV)
    with pytest.raises(FileFormatError, match="the process it was opened in ended by SIGSEGV"):
        program.run(X)
    with pytest.raises(FileFormatError, match="has ended"):
        program.run(X)


@pytest.mark.slow
def test_what_the_other_process_raises_is_raised_here(pte, tmp_path):
    path = without_checksum(pte, tmp_path)
    with pytest.raises(LoweringError, match="has no method 'encode'; its methods are forward"):
        open_program(path, "encode")
    content, drawn, endings = path.read_bytes(), random.Random(0), set()
    for _ in range(4):
        damaged = bytearray(content)
        for _ in range(200):
            damaged[drawn.randrange(64, len(content))] ^= 1 << drawn.randrange(8)
        path.write_bytes(damaged)
        try:
            open_program(path).run(X)
        except Quant2eError as error:
            endings.add(type(error).__name__)
    assert endings <= {"FileFormatError", "LoweringError"}
    assert endings


# --------------------------------------------------------------------------------------- what is no program


def header(content, **put):
    fields = dict(zip(("length", "program", "base", "segments"), struct.unpack_from("<IQQQ", content, 12), strict=True))
    return content[:12] + struct.pack("<IQQQ", *{**fields, **put}.values()) + content[40:]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: b"", "is not a program of ExecuTorch"),
        (lambda c: c[:7], "is not a program of ExecuTorch"),
        (lambda c: c[:4] + b"ET00" + c[8:], "its bytes 4 to 8 are b'ET00', not b'ET12'"),
        (lambda c: b"PK\3\4" + bytes(100), "is not a program of ExecuTorch"),
        (lambda c: c[:12], "it has 12 bytes"),
        (lambda c: c[:100], "it has 100 bytes, and by its header"),
        (lambda c: header(c, length=4), "its header says that it is 4 bytes long"),
        (lambda c: header(c, length=1 << 30), "its header says that it is 1,073,741,824 bytes long"),
        (lambda c: header(c, program=1 << 60), "inside of the program"),
        (lambda c: header(c, program=1 << 60, base=0), "by its header 1,152,921,504,606,846,976 or more"),
        (lambda c: header(c, base=64), "its segments begin at 64, inside"),
        (lambda c: header(c, base=1 << 50), "by its header"),
        (lambda c: header(c, segments=1 << 63), "by its header"),
        (lambda c: struct.pack("<I", 0) + c[4:], "its root is at 0"),
        (lambda c: struct.pack("<I", 1 << 31) + c[4:], "its root is at 2,147,483,648"),
        (lambda c: c[: (at := root(c))] + struct.pack("<i", -(1 << 30)) + c[at + 4 :], "the fields of its root are at"),
        (lambda c: c[: (at := root(c))] + struct.pack("<i", 1 << 30) + c[at + 4 :], "the fields of its root are at -"),
        (lambda c: c[: (at := fields(c))] + b"\xff\xff" + c[at + 2 :], "are not within it"),
        (lambda c: c[: (at := fields(c))] + struct.pack("<HHH", 6, 8, 9) + c[at + 6 :], "a field of its root"),
    ],
)
def test_structure_of_a_pte(pte, damage, said):
    content = pte.read_bytes()
    check_structure(content, "model.pte")
    with pytest.raises(FileFormatError, match=r"^model\.pte") as raised:
        check_structure(damage(content), "model.pte")
    assert said in str(raised.value)


def root(content):
    return struct.unpack_from("<I", content)[0]


def fields(content):
    return root(content) - struct.unpack_from("<i", content, root(content))[0]


@pytest.mark.parametrize("suffix", [".pte", ".onnx", ".xml", ".pt2"])
def test_bytes_that_are_no_program_at_all(tmp_path, suffix):
    """Each of them ended the process, or was an error of somebody else's, when the runtime of a ``.pte`` saw it."""
    drawn, path = random.Random(0), tmp_path / f"model{suffix}"
    for length in [0, 1, 8, 40, 300, 3000]:
        path.write_bytes(drawn.randbytes(length))
        with pytest.raises(FileFormatError, match="model"):
            open_program(path, isolated=False)
    with pytest.raises(FileNotFoundError):
        open_program(tmp_path / f"none{suffix}")


@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_other_kinds_of_files(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"program files end in \.pte .*, \.onnx, \.xml .* or \.pt2"):
        read_program(path)


def test_packages_of_native_code_are_not_run(tmp_path):
    path = tmp_path / "package.pt2"
    path.write_bytes(finished(archive([]), PackageRecord(versions={}, instructions="", inputs=())))
    with pytest.raises(FileFormatError, match="a package of AOTInductor, which is native code and not run from here"):
        open_program(path)


def test_a_saved_model_says_whether_it_is_unchanged(tmp_path):
    path, other = tmp_path / "model.pt2", tmp_path / "other.pt2"
    save(capture(Net().eval(), X), path, X)
    program = open_program(path)
    assert (program.unchanged, program.isolated) == (True, False)
    (output,) = program.run(program.tensors())
    assert output.shape == (2, 4)
    torch.export.save(torch.export.export(Net().eval(), X), other)
    assert not open_program(other).unchanged
