"""The zoo's rows: what is stored is what the page says, holds what it has to, and is what a run gives."""

from dataclasses import replace

import pytest
import torch

from tests.zoo import page
from tests.zoo.architecture import Architecture, Extent, normal
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.row import Lowered, Quantized, Row, differences, read, write
from tests.zoo.run import targets_of, visit, wrong

ROWS = read()


def row(**fields):
    quantized = Quantized(share=0.5, sqnr_db=30.0, other_db=31.0, saved="same bits", float_work={"too wide": 2})
    row = Row(name="a", family="b", parameters=3, varying=("batch",), quantizers={"x86": quantized},
              targets={"ONNX": Lowered(parts=2, kernels=1, sqnr_db=80.0)})  # fmt: skip
    return replace(row, **fields)


def quantized(**fields):
    return row(quantizers={"x86": replace(row().quantizers["x86"], **fields)})


DIFFERENT = {
    "fewer decibels": (quantized(sqnr_db=28.0), "x86: sqnr_db was 30.0, and is 28.0"),
    "other sizes": (quantized(other_db=None), "x86: other_db was 31.0, and is None"),
    "less on integers": (quantized(share=0.49), "x86: share was 0.5, and is 0.49"),
    "refused": (quantized(refused="no"), "x86: refused was '', and is 'no'"),
    "other reasons": (quantized(float_work={}), "x86: float_work was {'too wide': 2}, and is {}"),
    "more delegates": (row(targets={"ONNX": Lowered(parts=3, kernels=1)}), "ONNX: parts was 2, and is 3"),
    "no target": (row(targets={}), "ONNX: parts was 2, and is 0"),
    "another model": (row(parameters=4), "3 parameters, sizes ('batch',): now 4, ('batch',)"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_changed_is_said(case):
    found, said = DIFFERENT[case]
    assert said in list(differences(row(), found))


def test_small_changes_are_none():
    near = quantized(sqnr_db=30.9, other_db=30.1, share=0.502)
    assert list(differences(row(), near)) == []


def test_rows_are_read_as_they_were_written(tmp_path):
    write([row()], tmp_path / "rows.json")
    assert read(tmp_path / "rows.json") == {"a": row()}


LINEAR = Architecture(name="linear", family="test", build=lambda: torch.nn.Linear(8, 8),
                      inputs={"input": normal("batch", 8)}, sizes={"batch": Extent(2, 3, 4)})  # fmt: skip


def test_what_no_table_excuses():
    assert list(wrong(LINEAR, row())) == []
    assert list(wrong(LINEAR, quantized(saved="output 0"))) == ["x86: a file computes something else: output 0"]
    assert list(wrong(LINEAR, quantized(sqnr_db=3.0))) == ["x86: 3.0 dB, and the floor is 15.0 dB"]
    assert list(wrong(LINEAR, row(crashes={"ONNX": "KeyError"}))) == ["ONNX crashed: KeyError"]


def test_shapes_and_sizes_go_together():
    with pytest.raises(ValueError, match=r"linear: shapes name \['batch'\], sizes \[\]"):
        replace(LINEAR, sizes={})


def test_the_page_is_what_the_rows_say():
    assert page.PAGE.read_text(encoding="utf-8") == page.text(list(ROWS.values()))


def test_there_are_enough():
    assert len(ARCHITECTURES) >= 40
    assert 3 * sum(bool(one.varying) for one in ARCHITECTURES.values()) >= len(ARCHITECTURES)
    assert sum(one.inductor for one in ARCHITECTURES.values()) >= 10


def test_rows_are_of_architectures_in_their_order():
    assert list(ROWS) == [name for name in ARCHITECTURES if name in ROWS]
    assert ROWS


@pytest.mark.parametrize("name", ROWS)
def test_rows_hold_what_they_have_to(name):
    assert list(wrong(ARCHITECTURES[name], ROWS[name])) == []


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_gives_the_stored_row(name):
    """What did not run yet is held to what no table excuses."""
    pytest.importorskip("transformers")
    pytest.importorskip("executorch")
    stored = ROWS.get(name)
    found = visit(ARCHITECTURES[name], targets_of(ARCHITECTURES[name]) if stored is None else tuple(stored.targets))
    assert [*wrong(ARCHITECTURES[name], found), *(differences(stored, found) if stored else ())] == []
