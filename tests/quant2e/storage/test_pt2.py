"""Files: what comes back is what was saved, a failed save harms nothing, and a hostile file runs nothing."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quant2e.calibration.calibrate import calibrate
from quant2e.convert.convert import convert_pt2e
from quant2e.errors import FileFormatError, Quant2eError
from quant2e.graph.captured.capture import capture
from quant2e.graph.printer import graph_text
from quant2e.pipeline import quantize
from quant2e.prepare.prepare import prepare_pt2e
from quant2e.quantized_model import load, save
from quant2e.report.encodings import ENCODINGS, Encodings, GroupEncoding
from quant2e.storage import pt2 as storage
from quant2e.storage.manifest import MANIFEST
from quant2e.storage.record import RECORD_FORMAT
from tests.quant2e.annotators import DYNAMIC, products
from tests.quant2e.storage.archives import records_in, rewritten, zipped

ROOT = Path(__file__).parents[3]


class Net(nn.Module):
    """Linear layers, a written buffer, keyword and nested inputs."""

    def __init__(self, width=16):
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, *, extra):
        self.calls.add_(1)
        y = self.second(self.first(x).relu() + extra["bias"][0])
        return {"y": y, "pair": (y.argmax(-1), x)}


def batch(size=3, width=16):
    return (torch.randn(size, width),), {"extra": {"bias": [torch.randn(2 * width)]}}


@pytest.fixture
def quantized():
    args, kwargs = batch()
    shapes = {"x": {0: torch.export.Dim("n", min=2, max=64)}, "extra": {"bias": [None]}}
    return quantize(Net().eval(), args, products(act=DYNAMIC, output=None), kwargs=kwargs, dynamic_shapes=shapes)


@pytest.fixture
def saved(quantized, tmp_path):
    path = tmp_path / "model.pt2"
    quantized.save(path)
    return path


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


def run(code, *args, **options):
    options.setdefault("env", {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True, text=True, check=False, **options,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- round trip


def test_round_trip_here(quantized, saved):
    again = load(saved)
    for size in (2, 3, 7):
        args, kwargs = batch(size)
        for ours, theirs in zip(leaves(again(*args, **kwargs)), leaves(quantized(*args, **kwargs)), strict=True):
            assert torch.equal(ours, theirs)
    assert str(again.report) == str(quantized.report)
    assert again.encodings == quantized.encodings
    assert again.module.get_buffer("calls").item() == quantized.module.get_buffer("calls").item()
    for ours, theirs in zip(leaves(again.example_inputs), leaves(quantized.example_inputs), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert list(again.example_kwargs) == ["extra"]
    assert again.stand_ins


def test_dynamic_shapes_survive_two_rounds(saved, tmp_path):
    again = load(saved)
    assert again.dynamic_shapes is not None
    again.save(tmp_path / "again.pt2")
    third = load(tmp_path / "again.pt2")
    args, kwargs = batch(9)
    for ours, theirs in zip(leaves(third(*args, **kwargs)), leaves(again(*args, **kwargs)), strict=True):
        assert torch.equal(ours, theirs)
    assert graph_text(third.module.graph) == graph_text(again.module.graph)


def test_round_trip_in_a_fresh_process_that_imports_only_quant2e(quantized, saved, tmp_path):
    args, kwargs = batch(5)
    torch.save((args, kwargs), tmp_path / "batch.pt")
    code = """
        import sys, quant2e, torch
        model = quant2e.load(sys.argv[1])
        args, kwargs = torch.load(sys.argv[2])
        torch.save(model(*args, **kwargs), sys.argv[3])
        assert not {"torchao", "executorch", "quantizers", "lowering"} & set(sys.modules)
    """
    done = run(code, saved, tmp_path / "batch.pt", tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    for theirs, ours in zip(leaves(torch.load(tmp_path / "out.pt")), leaves(quantized(*args, **kwargs)), strict=True):
        assert torch.equal(ours, theirs)


def test_readable_by_torch_alone(quantized, saved, tmp_path):
    args, kwargs = batch(4)
    torch.save((args, kwargs), tmp_path / "batch.pt")
    code = """
        import sys, torch
        import torch.ao.quantization.fx._decomposed
        model = torch.export.load(sys.argv[1]).module()
        args, kwargs = torch.load(sys.argv[2])
        torch.save(model(*args, **kwargs), sys.argv[3])
        assert "quant2e" not in sys.modules
    """
    done = run(code, saved, tmp_path / "batch.pt", tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    for theirs, ours in zip(leaves(torch.load(tmp_path / "out.pt")), leaves(quantized(*args, **kwargs)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("quantizer", [products(), products(act=None, output=None)], ids=["static", "weight only"])
def test_a_file_of_linears_is_below_three_tenths_of_float(quantizer, tmp_path):
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).eval()
    x = torch.randn(2, 512)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "float.pt2")
    quantize(model, x, quantizer, [torch.randn(2, 512)] * 2).save(tmp_path / "int8.pt2")
    assert (tmp_path / "int8.pt2").stat().st_size < 0.30 * (tmp_path / "float.pt2").stat().st_size


def test_a_converted_graph_is_saved_with_its_report(tmp_path):
    prepared = prepare_pt2e(capture(nn.Linear(4, 4).eval(), torch.randn(2, 4)), products())
    calibrate(prepared, [torch.randn(2, 4)])
    gm = convert_pt2e(prepared)
    save(gm, tmp_path / "m.pt2", (torch.randn(2, 4),))
    again = load(tmp_path / "m.pt2")
    x = torch.randn(2, 4)
    assert torch.equal(again(x), gm(x))
    assert again.report.quantized_ops == 1
    assert again.encodings.groups[0].encoding == "per_tensor"


def test_one_tensor_as_two_example_inputs(tmp_path):
    class Difference(nn.Module):
        def forward(self, x, y):
            return x * 2 - y

    prepared = prepare_pt2e(capture(Difference().eval(), (torch.randn(2), torch.randn(2))), products())
    one = torch.randn(2)
    save(convert_pt2e(prepared), tmp_path / "m.pt2", (one, one))
    assert torch.equal(load(tmp_path / "m.pt2")(torch.ones(2), torch.zeros(2)), torch.full((2,), 2.0))


def test_a_plain_exported_program_is_read_without_a_report(tmp_path):
    torch.export.save(torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),)), tmp_path / "float.pt2")
    assert load(tmp_path / "float.pt2").report.verdicts == ()


def test_saving_leaves_the_model_alone(quantized, saved):
    calls = quantized.module.get_buffer("calls").item()
    text = graph_text(quantized.module.graph)
    quantized.save(saved)
    assert quantized.module.get_buffer("calls").item() == calls
    assert graph_text(quantized.module.graph) == text


# ------------------------------------------------------------------------------------------------------------- atomic


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"the old file")
    yield path
    assert path.read_bytes() == b"the old file"
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".pt2"] == ["model.pt2"]


def test_a_failure_half_way(quantized, old, monkeypatch):
    def half(file, records):
        file.write(b"half")
        raise OSError("disk on fire")

    monkeypatch.setattr(storage, "write_records", half)
    with pytest.raises(OSError, match="disk on fire"):
        quantized.save(old)


def test_a_program_that_cannot_be_exported(quantized, old):
    with pytest.raises(Quant2eError, match="cannot be saved with these example inputs: .*missing extra"):
        save(quantized.module, old, (torch.randn(3, 5),))


def test_a_file_that_could_not_be_loaded_is_not_written(quantized, old, monkeypatch):
    monkeypatch.setattr(storage, "write_records", lambda file, records: file.write(b"not a zip"))
    with pytest.raises(Quant2eError, match="could be saved, but not loaded again"):
        quantized.save(old)


@pytest.mark.parametrize("name", ["model.pt", "model", "model.PT2", "model.pt2.zip"])
def test_a_wrong_suffix(quantized, tmp_path, name):
    with pytest.raises(Quant2eError, match=r"the suffix of an exported program is \.pt2"):
        quantized.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist(quantized, tmp_path):
    with pytest.raises(FileNotFoundError):
        quantized.save(tmp_path / "nowhere" / "model.pt2")


def test_a_graph_without_its_inputs(quantized, old):
    with pytest.raises(Quant2eError, match="does not remember its example inputs"):
        save(quantized.module, old)


SAVE = """
    import sys, quant2e, torch
    from torch import nn
    from tests.quant2e.annotators import products
    model = quantize = quant2e.quantize(
        nn.Linear(512, 512).eval(), torch.randn(2, 512), products(act=None, output=None)
    )
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits and signals")
def test_a_full_disk(old):
    code = (
        SAVE
        + """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        model.save(sys.argv[1])
    except OSError as error:
        print("refused:", error)
    """
    )
    done = run(code, old)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:")


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits and signals")
def test_killed_half_way(tmp_path):
    old = tmp_path / "model.pt2"
    old.write_bytes(b"the old file")
    code = (
        SAVE
        + """
    import os, signal
    from quant2e.storage import pt2
    def killed(file, records):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    pt2.write_records = killed
    model.save(sys.argv[1])
    """
    )
    done = run(code, old)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert old.read_bytes() == b"the old file"


def test_permissions_of_the_old_file_are_kept(quantized, saved):
    saved.chmod(0o640)
    quantized.save(saved)
    assert saved.stat().st_mode & 0o777 == 0o640


# ------------------------------------------------------------------------------------------------------------- record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"{", "is not JSON"),
        (b"{}", "has format None"),
        (b"[]", "must be an object"),
        (b"3", "must be an object"),
        (b'{"format": 99}', "reads format 1 and 2 and 3"),
        (json.dumps({"format": RECORD_FORMAT, "report": {}, "recipe": {}}).encode(), "is damaged"),
    ],
)
def test_a_record_that_is_not_ours(saved, tmp_path, record, message):
    with pytest.raises(FileFormatError, match=message):
        load(rewritten(saved, tmp_path / "m.pt2", **{"extra/quant2e.json": record}))


def test_a_file_without_its_manifest(saved, tmp_path):
    records = {name: data for name, data in records_in(saved).items() if name != MANIFEST}
    (tmp_path / "m.pt2").write_bytes(zipped(records))
    with pytest.raises(FileFormatError, match="has no manifest, and files of its format have one"):
        load(tmp_path / "m.pt2")


# ------------------------------------------------------------------------------------------------------------- recipe

NAMES = st.text(st.characters(codec="utf-8"), max_size=12)
SCALES = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
POINTS = st.integers(-256, 256) | st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def group_encodings(draw):
    low, high = sorted([draw(st.integers(-(2**31), 2**31)), draw(st.integers(-(2**31), 2**31))])
    numbers = draw(st.lists(st.tuples(SCALES, POINTS), max_size=3))
    return GroupEncoding(
        points=tuple(draw(st.lists(NAMES, max_size=3))),
        spec=draw(NAMES),
        encoding=draw(st.sampled_from(ENCODINGS)),
        dtype=draw(NAMES),
        quant_min=low,
        quant_max=high,
        axis=draw(st.none() | st.integers(0, 5)),
        scale=tuple(scale for scale, _ in numbers),
        zero_point=tuple(point for _, point in numbers),
    )


GROUPS = group_encodings()


@given(st.builds(Encodings, quantizer=NAMES, groups=st.lists(GROUPS, max_size=3).map(tuple)))
@settings(max_examples=100, deadline=None)
def test_recipes_survive_json(encodings):
    assert Encodings.from_dict(json.loads(json.dumps(encodings.as_dict()))) == encodings


def test_recipes_survive_a_file(quantized, tmp_path):
    quantized.encodings.to_file(tmp_path / "recipe.json")
    assert Encodings.from_file(tmp_path / "recipe.json") == quantized.encodings


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"format": 2}',
        '{"format": 1}',
        '{"format": 1, "quantizer": 1, "groups": [{"a": 1}]}',
        '{"format": 1, "quantizer": "", "groups": 5}',
    ],
)
def test_what_is_no_recipe(tmp_path, text):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(FileFormatError):
        Encodings.from_file(tmp_path / "recipe.json")
