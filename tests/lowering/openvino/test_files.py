"""The two files of an OpenVINO model: written and checked as one. OpenVINO itself is not needed."""

from pathlib import Path

import pytest

from lowering import check_file
from lowering.files.program_file import read_program
from lowering.openvino.files import read_pair, seal_of, write_pair
from quant2e.checksum import BLANK, sealed
from quant2e.errors import FileFormatError, LoweringError


def graph_of(weights: bytes, more: str = "") -> bytes:
    return sealed(f'<net><sha256 value="{BLANK}"/><beside value="{seal_of(weights)}"/>{more}</net>'.encode())


@pytest.fixture
def path(tmp_path):
    write_pair(tmp_path / "a.xml", graph_of(b"weights"), b"weights")
    return tmp_path / "a.xml"


def test_both_are_written_and_read(path):
    assert read_pair(path) == (graph_of(b"weights"), b"weights", True)
    assert check_file(path)
    assert sorted(one.name for one in path.parent.iterdir()) == ["a.bin", "a.xml"]
    program = read_program(path)
    assert (program.weights, program.unchanged) == (b"weights", True)


def test_they_are_written_over_the_old_ones_also_behind_a_link(path, tmp_path):
    link = tmp_path / "link.xml"
    link.symlink_to(path)
    (tmp_path / "link.bin").symlink_to(path.with_suffix(".bin"))
    write_pair(link, graph_of(b"new"), b"new")
    assert link.is_symlink()
    assert read_pair(path) == (graph_of(b"new"), b"new", True)


def test_an_empty_bin_is_one(tmp_path):
    write_pair(tmp_path / "a.xml", graph_of(b""), b"")
    assert check_file(tmp_path / "a.xml")


@pytest.mark.parametrize("damage", ["exchanged", "cut", "gone", "graph"])
def test_damage_of_either_is_found(path, damage):
    beside = path.with_suffix(".bin")
    if damage == "exchanged":
        beside.write_bytes(b"Weights")
    elif damage == "cut":
        beside.write_bytes(b"weight")
    elif damage == "gone":
        beside.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"<net>", b"<Net>"))
    for read in (check_file, read_pair):
        with pytest.raises(FileFormatError, match=r"a\.xml was damaged" if damage == "graph" else r"a\.bin is not"):
            read(path)


def test_files_of_others_carry_nothing(tmp_path):
    (tmp_path / "a.xml").write_bytes(b"<net/>")
    assert read_pair(tmp_path / "a.xml") == (b"<net/>", b"", False)
    (tmp_path / "a.xml").write_bytes(b"\x08\x00")
    with pytest.raises(FileFormatError, match="it is not XML"):
        read_pair(tmp_path / "a.xml")


@pytest.mark.parametrize("name", ["model", "model.bin", "model.onnx"])
def test_another_suffix_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(LoweringError, match=r"give a path that ends in \.xml"):
        write_pair(tmp_path / name, b"<net/>", b"")
    assert list(tmp_path.iterdir()) == []


def failing(monkeypatch, suffix):
    """Moves into the place of a file of that suffix fail from here on, once."""
    move, left = Path.replace, [1]

    def replaced(self, target):
        if Path(target).suffix == suffix and left:
            left.pop()
            raise OSError("the disk is full")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", replaced)


def test_an_error_before_the_weights_are_replaced_leaves_both_as_they_were(path, monkeypatch):
    failing(monkeypatch, ".bin")
    with pytest.raises(OSError, match="disk is full"):
        write_pair(path, graph_of(b"new"), b"new")
    assert read_pair(path) == (graph_of(b"weights"), b"weights", True)
    assert sorted(one.name for one in path.parent.iterdir()) == ["a.bin", "a.xml"]


def test_an_error_between_the_two_leaves_no_graph_rather_than_one_with_other_weights(path, monkeypatch):
    failing(monkeypatch, ".xml")
    with pytest.raises(OSError, match="disk is full"):
        write_pair(path, graph_of(b"new"), b"new")
    assert sorted(one.name for one in path.parent.iterdir()) == ["a.bin"]
    write_pair(path, graph_of(b"new"), b"new")
    assert check_file(path)
