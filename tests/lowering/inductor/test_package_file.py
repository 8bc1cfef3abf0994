"""Package files: a checksum over every byte of the zip, and no folder of this machine in what was generated."""

import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lowering.inductor.compile import _check_files
from lowering.inductor.package_file import archive, finished, hidden, load_package
from quant2e.checksum import check_content
from quant2e.errors import FileFormatError, LoweringError
from quant2e.storage.inductor_package import PackageInput, PackageRecord, is_package, read_package_record

RECORD = PackageRecord(
    versions={"torch": "2.13"},
    instructions="AVX2",
    inputs=(PackageInput(name="x", dtype=torch.float32, sizes=((1, 8), (3, 3)), channels_last=True),),
    lowering={"headline": "1 of 1", "notes": ["a note"]},
)
HERE = str(Path(torch.__file__).parents[1]).encode()


@pytest.fixture
def files(tmp_path):
    generated = tmp_path / "a.wrapper.cpp", tmp_path / "a.wrapper.so", tmp_path / "a.wrapper_metadata.json"
    texts = b"// g++ " + HERE + b"/torch/x.h", b"\x7fELF\0" + HERE + b"/torch/x.h\0" + HERE, b"{}"
    for path, text in zip(generated, texts, strict=True):
        path.write_bytes(text)
    return [str(path) for path in generated]


def test_a_package_holds_what_was_generated_without_folders_and_the_sources_stay(files):
    before = [Path(file).read_bytes() for file in files]
    content = finished(archive([*files, ""]), RECORD)
    assert check_content(content, "x")
    assert [Path(file).read_bytes() for file in files] == before
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        held = {Path(name).name: opened.read(name) for name in opened.namelist()}
        parts = [name.partition("/")[2] for name in opened.namelist()]
    assert sorted(parts) == sorted(reader.get_all_records())
    assert held["a.wrapper.cpp"] == b"// g++ ./torch/x.h"
    assert held["a.wrapper_metadata.json"] == b"{}"
    library = held["a.wrapper.so"]
    assert len(library) == len(before[1])
    assert library.startswith(b"\x7fELF\0.//")
    assert library.count(b"/torch/x.h\0") == 1
    assert library.endswith(b"\0" + HERE)  # no name of a source file: numbers may look like that


@pytest.mark.parametrize("folder", [sys.base_prefix, str(Path.home()), str(Path.cwd())])
def test_folders_are_hidden_in_text(folder):
    assert hidden(f"// {folder}/model.py:3\n".encode(), text=True) == b"// ./model.py:3\n"


def test_a_package_that_was_changed_is_not_loaded(files, tmp_path):
    path, content = tmp_path / "model.pt2", finished(archive(files), RECORD)
    for at in range(0, len(content), 101):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(FileFormatError, match=r"model\.pt2"):
            load_package(path)
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(FileFormatError, match=r"model\.pt2 is not the package that was written here"):
        load_package(path)
    path.write_bytes(content)  # whole, and no package: its library is none
    with pytest.raises(LoweringError, match=r"model\.pt2 cannot be loaded"):
        load_package(path)


def test_a_package_says_what_it_is(files, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(finished(archive(files), RECORD))
    assert is_package(path)
    assert read_package_record(path) == RECORD
    with zipfile.ZipFile(path) as zipped:
        assert zipped.testzip() is None
    path.write_bytes(archive(files))
    assert is_package(path)
    assert read_package_record(path) is None
    path.write_bytes(b"no zip")
    assert not is_package(path)
    with pytest.raises(FileFormatError, match=r"model\.pt2 is no package, or is damaged"):
        read_package_record(path)


@pytest.mark.parametrize(
    "changed",
    [{"format": 9}, {"inputs": [{"name": "x"}]}, {"report": {}}, {"lowering": []}, {"versions": {"torch": 2}}],
)
def test_a_record_that_is_none_is_told(files, tmp_path, changed):
    path = tmp_path / "model.pt2"
    content = finished(archive(files), RECORD)
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            raw = old.read(name)
            new.writestr(
                name, json.dumps({**json.loads(raw), **changed}) if name.endswith("quant2e_package.json") else raw
            )
    with pytest.raises(FileFormatError, match=r"model\.pt2 is damaged"):
        read_package_record(path)


@pytest.mark.parametrize("target", ["torch.ops.onednn.qlinear_pointwise.default", "quantized::max_pool2d", "aten::add"])
def test_ops_of_torch_itself_are_taken_however_they_are_spelled(tmp_path, target):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"nodes": [{"node": {"target": target}}]}))
    _check_files([path])


@pytest.mark.parametrize("target", ["torch.ops.quant2e.weight_only.default", "quant2e::weight_only"])
def test_ops_that_torch_does_not_have_are_refused(tmp_path, target):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"nodes": [{"node": {"target": target}}]}))
    with pytest.raises(LoweringError, match="weight_only.*, which a process that imports only torch does not have"):
        _check_files([path])
