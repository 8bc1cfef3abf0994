"""Package files: a checksum over every byte of the zip, and no folder of this machine in what was generated."""

import io
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lowering.inductor.package_file import archive, hidden, load_package
from quant2e.checksum import check_content
from quant2e.errors import FileFormatError, LoweringError

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
    content = archive([*files, ""])
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
    path, content = tmp_path / "model.pt2", archive(files)
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
