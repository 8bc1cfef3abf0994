"""Readers of records and files: whatever is in them, an error is one of ours.

Every document that something of ours writes is changed at random places: values are exchanged for others, keys and
items are dropped, copied and renamed, bytes are flipped and cut. What comes out is a reading or an error of ours.
"""

from __future__ import annotations

import copy
import io
import json
import math
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim

import quant2e
from lowering.files.program_file import read_arrays
from lowering.signature import Signature
from quant2e import Encodings, QuantizedIO, Report
from quant2e.calibration.statistics import Statistics
from quant2e.documents.arrays import read_archive
from quant2e.documents.json_text import read_json
from quant2e.errors import FileFormatError, Quant2eError
from quant2e.quantized_io import Port
from quant2e.report.encodings import GroupEncoding
from quant2e.report.float_ops import FloatOp
from quant2e.report.report import Verdict

REPORT = Report(
    verdicts=(
        Verdict(FloatOp("linear", "aten.linear.default", "fc", "m.py:3", 32), "static", "linear"),
        Verdict(FloatOp("relu", "aten.relu.default", "", "", 0), "float", "no rule"),
    ),
    notes=("a note",),
    float_bytes=128,
    quantized_bytes=32,
    sqnr_db=math.inf,
    sqnr_source="8 batches",
)
ENCODINGS = Encodings(
    "XNNPACKQuantizer",
    (
        GroupEncoding(("x", "x -> linear"), "int8", "per_tensor", "int8", -128, 127, None, (0.5,), (3,)),
        GroupEncoding(("w",), "int8", "per_channel", "int8", -127, 127, 0, (0.5, 0.25), (0, 0)),
        GroupEncoding(("t",), "uint8", "per_group", "uint8", 0, 15, None, (0.5, 0.25), (0.5, 1.5), group_size=32),
        GroupEncoding(("y",), "float", "float"),
    ),
)
PORT = Port(name="x", index=0, scale=0.5, zero_point=3, quant_min=-128, quant_max=127, dtype=torch.int8)
QUANTIZED_IO = QuantizedIO((PORT,), (PORT,), {"ids": "integers"})

RECORDS = {
    "report": (REPORT.as_dict(), Report.from_dict),
    "encodings": (ENCODINGS.as_dict(), Encodings.from_dict),
    "quantized io": (QUANTIZED_IO.as_dict(), QuantizedIO.from_dict),
}


def as_json(record):
    return json.loads(json.dumps(record))


@pytest.mark.parametrize("kind", RECORDS)
def test_what_is_written_is_read(kind):
    record, read = RECORDS[kind]
    value = {"report": REPORT, "encodings": ENCODINGS, "quantized io": QUANTIZED_IO}[kind]
    assert read(as_json(record)) == value
    assert read(record) == value


# ------------------------------------------------------------------------------------------------------ any mutation

ODD = st.sampled_from(
    [None, True, 0, -1, 2**63, -(2**70), 10**400, 1.5, math.nan, math.inf, "", "nan", "int8", "per_channel", "\ud800",
     [], {}, [[]], {"": {}}, b"x", (), [None], {"op": 1}, object()]
)  # fmt: skip
VALUES = ODD | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(data, path=()):
    """Where the parts of a document are."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def mutated(draw, record):
    """``record`` changed at one to three places."""
    data = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(data), key=str)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        owner = data
        for key in path[:-1]:
            owner = owner[key]
        what = draw(st.sampled_from(["value", "drop", "copy", "rename", "deep"]))
        if what == "value":
            owner[path[-1]] = draw(VALUES)
        elif what == "drop":
            del owner[path[-1]]
        elif what == "copy" and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[path[-1]]))
        elif what == "rename" and isinstance(owner, dict):
            owner[draw(st.text(max_size=8) | st.integers() | st.sampled_from(["kind", "format"]))] = owner.pop(path[-1])
        elif what == "deep":
            deep = []
            for _ in range(2000):
                deep = [deep]
            owner[path[-1]] = deep
            break
    return data


RANDOMLY = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@pytest.mark.parametrize("kind", RECORDS)
@given(data=st.data())
@RANDOMLY
def test_a_changed_record_is_read_or_refused_by_an_error_of_ours(kind, data):
    record, read = RECORDS[kind]
    wrong = data.draw(mutated(as_json(record)))
    try:
        found = read(wrong)
    except FileFormatError:
        return
    assert type(found) is type(read(record))
    read(as_json(found.as_dict()))  # what was read can be written, and read again


TEXTS = {
    "no object": ("[]", "must be an object"),
    "a group that is no dict": (
        '{"format": 1, "quantizer": "", "groups": [3]}',
        r"groups\[0\] is 3, and must be",
    ),
    "another format": ('{"format": 7, "quantizer": "", "groups": []}', "has format 7; this version reads format 1"),
    "no format": ('{"quantizer": "", "groups": []}', "has format None"),
    "a format that is true": ('{"format": true, "quantizer": "", "groups": []}', "has format True"),
    "a key twice": ('{"format": 1, "format": 1}', "stands twice"),
    "NaN": ('{"format": 1, "quantizer": NaN}', "NaN is no number"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep objects": ('{"a":' * 50_000, "nested too deeply"),
    "half a text": ('{"format', "is not JSON"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_encodings_from_a_file(kind, tmp_path):
    text, message = TEXTS[kind]
    path = tmp_path / "encodings.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=message):
        Encodings.from_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.update(scale=[0.5, "x"]), r"groups\[0\].scale\[1\] is 'x', and must be a number"),
        (lambda g: g.update(scale=[math.nan]), "a scale is not a positive, finite number"),
        (lambda g: g.update(scale=[-0.5]), "a scale is not a positive, finite number"),
        (lambda g: g.update(quant_min=200), "is empty"),
        (lambda g: g.update(zero_point=[]), "do not pair up"),
        (lambda g: g.update(points="x"), "points is 'x', and must be a list"),
        (lambda g: g.update(encoding="magic"), "'magic' is none of the encodings"),
        (lambda g: g.update(axis=True), "axis is True, and must be"),
        (lambda g: g.pop("points"), r"groups\[0\] has no points"),
        (lambda g: g.update(author="me"), "'author', which is no part of it"),
    ],
)
def test_an_error_says_where_in_the_record_it_is(change, message):
    record = as_json(ENCODINGS.as_dict())
    change(record["groups"][0])
    with pytest.raises(FileFormatError, match=message):
        Encodings.from_dict(record)


def test_encodings_without_groups_of_channels_are_read_too():
    """As versions wrote them before there were groups."""
    record = as_json(ENCODINGS.as_dict())
    for group in record["groups"]:
        del group["group_size"]
    assert Encodings.from_dict(record).groups[0] == ENCODINGS.groups[0]


@pytest.mark.parametrize("dtype", ["float32", "complex64", "int64", "bool", "nn", "__class__", "torch.nn"])
def test_ports_have_dtypes_of_integers(dtype):
    record = as_json(QUANTIZED_IO.as_dict())
    record["inputs"][0]["dtype"] = dtype
    with pytest.raises(FileFormatError, match=r"inputs\[0\]"):
        QuantizedIO.from_dict(record)


@given(st.binary(max_size=60) | st.text(max_size=60))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_any_text_is_json_or_refused(text):
    try:
        read_json(text, "it")
    except FileFormatError:
        return


# ------------------------------------------------------------------------------------------------------------- files


def npz():
    file = io.BytesIO()
    np.savez(file, np.arange(6, dtype=np.float32).reshape(2, 3), np.array([True, False]), np.float64(3.0))
    return file.getvalue()


def statistics(tmp_path_factory):
    counts = torch.tensor([6, 0, 1, 1])
    states = {
        "a": {"min_val": torch.tensor(-1.0), "max_val": torch.tensor(2.0), "counts": counts,
              "histogram": torch.tensor([1, 0, 3, 0])},
        "b": {"min_val": torch.tensor([0.0, math.inf]), "max_val": torch.tensor([1.0, -math.inf]), "counts": counts},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("readers") / "a.stats"
    Statistics("graph", states, frozenset({"b"}), {"a": "Histogram", "b": "MinMax"}, 3).save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return {"statistics": statistics(tmp_path_factory), "npz": npz()}


READERS = {"statistics": Statistics.load, "npz": read_arrays}


def as_text(data):
    try:
        return json.dumps(data, default=str).encode("utf-8", "replace")
    except (RecursionError, ValueError, TypeError):  # too deep to be written
        return b"[" * 5000


@st.composite
def damaged(draw, raw):
    """Bytes with some of them changed, or cut, or an archive with some of its members changed."""
    if draw(st.booleans()):
        changed = bytearray(raw)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
        return bytes(changed[: draw(st.sampled_from([len(raw), len(raw) - 1, len(raw) // 2, 3, 0]))])
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        victim = draw(st.sampled_from(names))
        for name in names:
            content = old.read(name)
            if name == victim and name.endswith(".json"):
                content = as_text(draw(mutated(json.loads(content))))
            elif name == victim:
                content = bytearray(content)
                content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
            if name != victim or draw(st.integers(0, 9)):
                new.writestr(draw(st.sampled_from([name, name, name, "x", "../" + name])), bytes(content))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
@RANDOMLY
def test_a_damaged_file_is_read_or_refused_by_an_error_of_ours(kind, honest, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / f"damaged {kind}"
    path.write_bytes(data.draw(damaged(honest[kind])))
    try:
        READERS[kind](path)
    except FileFormatError:
        return


@pytest.mark.parametrize("kind", READERS)
def test_every_cut_of_a_file_is_refused(kind, honest, tmp_path):
    path = tmp_path / "cut"
    for end in range(0, len(honest[kind]), 7):
        path.write_bytes(honest[kind][:end])
        with pytest.raises(FileFormatError):
            READERS[kind](path)


def test_a_folder_and_nothing_are_no_files(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        for read in (*READERS.values(), lambda path: read_archive(path, "archive")):
            with pytest.raises(FileFormatError, match="does not exist, or is not a file"):
                read(path)


def test_arrays_are_read_as_numpy_reads_them(tmp_path):
    arrays = [np.zeros((0, 3), np.int8), np.arange(6).reshape(2, 3).T, np.float16([1, 2]), np.array([[True], [False]]),
              np.arange(4, dtype=">i4"), np.float32(3)]  # fmt: skip
    np.savez_compressed(tmp_path / "a.npz", *arrays)
    for found, wanted in zip(read_arrays(tmp_path / "a.npz"), arrays, strict=True):
        assert np.array_equal(found.numpy(), wanted)
        assert found.numpy().dtype == wanted.dtype.newbyteorder("=")


# ------------------------------------------------------------------------------------------------------------- calls


class Nested(nn.Module):
    """Takes a tensor, a dict of a list and a tensor, a number and a keyword."""

    def forward(self, x, batch, times=2, *, extra=None):
        y = x + batch["a"][0] + batch["b"]
        return y * times if extra is None else y + extra


X = torch.ones(2, 3)
BATCH = {"a": [X], "b": X}
OTHER = [
    None, 3, 2.5, math.nan, True, "x", b"x", X, [X], (X,), {}, BATCH, {"a": X, "b": [X]}, {"a": [X, X], "b": X},
    {"a": [3], "b": X}, {**BATCH, "c": X}, {1: X}, object(), torch.ones(2, 3, 4), X.long(), torch.ones(0, 3), [[[]]],
    torch.tensor(2), {"a": [None], "b": None}, range(3), "a" * 1000, OrderedDict(b=X, a=[X]), nn.Linear(2, 2),
    torch.Size([2, 3]), 10**30, len, np.ones((2, 3)), {"a": (X,), "b": X},
]  # fmt: skip


@pytest.fixture(scope="module")
def callables():
    size = Dim("batch", min=1, max=8)
    sizes = {"x": {0: size}, "batch": {"a": [{0: size}], "b": {0: size}}}
    found = []
    for times in (None, Dim.DYNAMIC):
        shapes = {**sizes, "times": times}
        graph = quant2e.capture(Nested(), (X, BATCH, 3), dynamic_shapes=shapes)
        signature = Signature(graph)
        found += [graph, lambda *args, own=signature, **kwargs: own.sizes(own.flatten(args, kwargs))]
    return [quant2e.capture(Nested(), (X, BATCH, 3)), *found]


KEYWORDS = st.dictionaries(st.sampled_from(["x", "batch", "times", "extra", "z"]), st.sampled_from(OTHER), max_size=2)


@given(
    place=st.integers(0, 2),
    given=st.sampled_from(OTHER),
    count=st.integers(0, 4),
    keywords=KEYWORDS,
)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_inputs_of_another_structure_are_an_error_of_ours(callables, place, given, count, keywords):
    inputs = [X, BATCH, 3, 3]
    inputs[place] = given
    for call in callables:
        try:
            call(*inputs[:count], **keywords)
        except Quant2eError:
            continue
