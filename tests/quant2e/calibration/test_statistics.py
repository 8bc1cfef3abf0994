"""One process, many processes, and a run that was killed and resumed: the same scales, bit for bit."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import quant2e
from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation, QuantizationSpec
from quant2e.calibration.statistics import Statistics, load_statistics, measuring, rederive, save_statistics
from quant2e.documents.arrays import read_archive, write_archive
from quant2e.errors import CalibrationError, FileFormatError
from quant2e.observers.measuring import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    default_per_channel_weight_observer,
)
from quant2e.ranges.search import METHODS

linear = torch.ops.aten.linear.default


class Linears(Quantizer):
    """Every linear: input and output by one kind of observer, weights per channel."""

    def __init__(self, observer=HistogramObserver, **options):
        scheme = {"dtype": torch.int8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_tensor_affine}
        if observer is PerChannelMinMaxObserver:
            scheme |= {"qscheme": torch.per_channel_affine, "ch_axis": 1}
        self.act = QuantizationSpec(
            **{**scheme, **options.pop("numbers", {})}, observer_or_fake_quant_ctr=observer.with_args(**options)
        )
        self.weight = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            observer_or_fake_quant_ctr=default_per_channel_weight_observer,
        )

    def annotate(self, model):
        for node in model.graph.nodes:
            if node.target is linear:
                x, w = node.args[:2]
                node.meta[ANNOTATION] = QuantizationAnnotation(
                    input_qspec_map={x: self.act, w: self.weight}, output_qspec=self.act
                )
        return model

    def validate(self, model):
        pass


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def data(n=12):
    g = torch.Generator().manual_seed(5)
    return [torch.randn(3, 8, generator=g) * 2.0 ** (i % 5) for i in range(n)]


def prepared(model=None, quantizer=None):
    captured = quant2e.capture(net() if model is None else model, (torch.randn(3, 8),), dynamic_shapes=None)
    return quant2e.prepare_pt2e(captured, quantizer or Linears())


def scales(model):
    return {n: [v.tolist() for v in o.calculate_qparams()] for n, o in measuring(model).items()}


def buffers(model):
    return {f"{n}.{p}": v.tolist() for n, o in measuring(model).items() for p, v in o.named_buffers()}


KINDS = [HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_merged_is_one_run(tmp_path, kind):
    whole = quant2e.calibrate(prepared(quantizer=Linears(kind)), data())
    paths = []
    for i, part in enumerate((slice(0, 3), slice(3, 4), slice(4, 12))):
        shard = quant2e.calibrate(prepared(quantizer=Linears(kind)), data()[part])
        paths.append(tmp_path / f"{i}.stats")
        save_statistics(shard, paths[-1])
    for order in (paths, paths[::-1]):
        again = load_statistics(prepared(quantizer=Linears(kind)), *order)
        assert buffers(again) == buffers(whole)
        assert scales(again) == scales(whole)
    half = load_statistics(prepared(quantizer=Linears(kind)), *paths[:2])
    assert buffers(quant2e.calibrate(half, data()[4:])) == buffers(whole)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("kind", [*KINDS, MovingAverageMinMaxObserver])
def test_a_run_that_was_killed_goes_on(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(sys.modules["quant2e.calibration.calibrate"], "CHECKPOINT_EVERY", 2)
    path = tmp_path / "run.stats"

    def until(n):
        for i, batch in enumerate(data()):
            if i == n:
                raise KilledError
            yield batch

    with pytest.raises(KilledError):
        quant2e.calibrate(prepared(quantizer=Linears(kind)), until(5), checkpoint=path)
    assert Statistics.load(path).batches == 4
    resumed = quant2e.calibrate(prepared(quantizer=Linears(kind)), data(), checkpoint=path)
    assert buffers(resumed) == buffers(quant2e.calibrate(prepared(quantizer=Linears(kind)), data()))
    assert Statistics.load(path).batches == 12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
def test_resolving_is_calibrating_anew(method, bits):
    once = quant2e.calibrate(prepared(), data())
    before = scales(once)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    fresh = prepared(quantizer=Linears(method=method, numbers={"quant_min": low, "quant_max": high}))
    derived = rederive(once, method=method, bits=bits)
    assert scales(derived) == scales(quant2e.calibrate(fresh, data()))
    assert scales(once) == before
    x = data()[0]
    assert torch.equal(quant2e.convert_pt2e(derived)(x), quant2e.convert_pt2e(fresh)(x))


def test_resolving_what_cannot_be_is_refused():
    plain = quant2e.calibrate(prepared(quantizer=Linears(MinMaxObserver)), data())
    with pytest.raises(CalibrationError, match="no activation has a histogram"):
        rederive(plain, method="mse")
    assert scales(rederive(plain, bits=4)) != scales(plain)
    for bits in (1, 9):
        with pytest.raises(quant2e.AnnotationError, match=f"bits={bits}: torch.int8 holds 2 to 8 bits"):
            rederive(plain, bits=bits)
    with pytest.raises(quant2e.AnnotationError, match="choose one of"):
        rederive(quant2e.calibrate(prepared(), data()), method="best")


def test_statistics_of_another_model_are_refused_with_the_difference(tmp_path):
    path = tmp_path / "a.stats"
    save_statistics(quant2e.calibrate(prepared(), data()), path)
    other = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    with pytest.raises(CalibrationError) as caught:
        load_statistics(prepared(other), path)
    text = str(caught.value)
    assert "belong to another model" in text
    assert "-relu = call_function aten.relu.default" in text
    assert "+tanh = call_function aten.tanh.default" in text
    with pytest.raises(CalibrationError, match=r"\+activation_post_process_0: MinMax\(axis=None"):
        load_statistics(prepared(quantizer=Linears(MinMaxObserver)), path)
    with pytest.raises(CalibrationError, match="collected with other weights: activation_post_process_"):
        load_statistics(prepared(net(seed=1)), path)


def test_moving_averages_refuse_to_merge(tmp_path):
    path = tmp_path / "a.stats"
    save_statistics(quant2e.calibrate(prepared(quantizer=Linears(MovingAverageMinMaxObserver)), data()), path)
    load_statistics(prepared(quantizer=Linears(MovingAverageMinMaxObserver)), path)
    with pytest.raises(CalibrationError, match="moving averages depend on the order"):
        load_statistics(prepared(quantizer=Linears(MovingAverageMinMaxObserver)), path, path)


def rewritten(path, target, change):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            raw = old.read(name)
            if name == "statistics.json":
                record = json.loads(raw)
                change(record)
                raw = json.dumps(record).encode()
            new.writestr(name, raw)
    return target


def as_format_1(path, target):
    """The file that the first format would be, with the estimators as text and the sums of every batch's extremes."""
    estimators = {name: repr(observer.estimator) for name, observer in measuring(prepared()).items()}
    histograms = [name for name, text in estimators.items() if text.startswith("Histogram")]

    def change(record):
        record.update(format=1, estimators=estimators)
        for name in histograms:
            record["states"][name].append("peaks")

    rewritten(path, target, change)
    raw = io.BytesIO()
    np.lib.format.write_array(raw, np.zeros((2, 256), dtype=np.int64))
    with zipfile.ZipFile(target, "a") as file:
        for name in histograms:
            file.writestr(f"{name}/peaks.npy", raw.getvalue())
    return target


def test_files_of_the_first_format_are_read(tmp_path):
    whole = quant2e.calibrate(prepared(), data())
    for i, part in enumerate((slice(0, 5), slice(5, 12))):
        save_statistics(quant2e.calibrate(prepared(), data()[part]), tmp_path / f"{i}.stats")
    old = as_format_1(tmp_path / "0.stats", tmp_path / "old.stats")
    assert len(zipfile.ZipFile(old).namelist()) > len(zipfile.ZipFile(tmp_path / "0.stats").namelist())
    assert buffers(load_statistics(prepared(), old, tmp_path / "1.stats")) == buffers(whole)


class Evil:
    def __reduce__(self):
        return (os.system, ("echo never > /tmp/quant2e-evil",))


def test_files_that_are_wrong_are_refused_in_words(tmp_path):
    path = tmp_path / "a.stats"
    save_statistics(quant2e.calibrate(prepared(), data()), path)
    target = prepared()
    changes = {
        "format": (lambda r: r.update(format=3), "has format 3; this version reads format 1 and 2"),
        "kind": (lambda r: r.update(kind="a poem"), "of another kind"),
        "state": (lambda r: r.pop("states"), "has no states"),
        "estimator": (lambda r: r["estimators"].update(activation_post_process_0="exit()"), "is none of MinMax"),
        "other": (
            lambda r: r["estimators"].update(activation_post_process_0="MinMax"),
            "are not those of a MinMax",
        ),
    }
    for name, (change, message) in changes.items():
        with pytest.raises(FileFormatError, match=message):
            load_statistics(target, rewritten(path, tmp_path / name, change))
    cut = tmp_path / "cut"
    cut.write_bytes(path.read_bytes()[:-40])
    evil = tmp_path / "evil"
    evil.write_bytes(pickle.dumps(Evil()))
    for wrong in (cut, evil, tmp_path / "missing"):
        with pytest.raises(FileFormatError):
            load_statistics(target, wrong)
    assert not any(o.observed for o in measuring(target).values() if not o.frozen)
    with pytest.raises(CalibrationError, match="at least one"):
        load_statistics(target)


FIRST = "activation_post_process_0"
"""An observer with a histogram of 2048 bins over 8 × 12 values and more."""


def state_with(state, **parts):
    return {**state, **{name: change(state[name].clone()) for name, change in parts.items()}}


def put_at(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


NEVER_MEASURED = {
    "NaN": ({"min_val": lambda t: t * float("nan")}, r"are \[nan"),
    "an infinite range": ({"max_val": lambda t: t + float("inf")}, "inf"),
    "min > max": ({"min_val": lambda t: t + 1e6}, "the smallest and the largest value are"),
    "no range, and values": (
        {"min_val": lambda t: t + float("inf"), "max_val": lambda t: t - float("inf")},
        "no range",
    ),
    "negative counts": ({"counts": lambda t: -t}, "the counts are"),
    "more NaN than values": ({"counts": put_at(1, 1 << 40)}, "more are not data than there are"),
    "too many": ({"counts": put_at(0, 1 << 60)}, "the counts are"),
    "a negative bin": ({"histogram": put_at(0, -5)}, "the histogram does not count"),
    "a bin too much": ({"histogram": lambda t: t + 1}, "the histogram does not count"),
    "two ranges": ({"max_val": lambda t: torch.zeros(2)}, "do not have the shapes of a Histogram"),
    "a matrix": (
        {"histogram": lambda t: torch.zeros(2, 8, dtype=torch.int64)},
        "do not have the shapes of a Histogram",
    ),
    "floats": ({"histogram": lambda t: t.double()}, "are not those of a Histogram"),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "a.stats"
    save_statistics(quant2e.calibrate(prepared(), data()), path)
    return path


@pytest.mark.parametrize("kind", NEVER_MEASURED)
def test_numbers_that_were_never_measured_are_refused_in_memory_and_from_files(seen, tmp_path, kind):
    parts, message = NEVER_MEASURED[kind]
    found = Statistics.load(seen)
    wrong = state_with(found.states[FIRST], **parts)
    with pytest.raises(CalibrationError, match=message):
        replace(found, states={**found.states, FIRST: wrong})
    raw = {}
    for name, value in wrong.items():
        file = io.BytesIO()
        np.lib.format.write_array(file, value.numpy())
        raw[f"{FIRST}/{name}.npy"] = file.getvalue()
    with pytest.raises(FileFormatError, match=message):
        Statistics.load(with_members(seen, tmp_path / "wrong.stats", raw))


def with_members(path, target, raw):
    """The same archive with other bytes in some members."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, raw.get(name, old.read(name)))
    return target


def header(text, numbers=b""):
    text = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + numbers


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (549755813888,), }"), "holds 0 bytes of numbers"),
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (4,), }", b"\0" * 31), "holds 31 bytes of numbers"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"x" * 8), "no array of plain numbers"),
        (header("{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (1,), }", b"x" * 8), "no array of plain"),
        (header("__import__('os').system('true')"), "no array of plain numbers"),
        (header("(" * 60000), "no array of plain numbers"),
        (
            header("{'descr': '<i8', 'fortran_order': False, 'shape': (0, 900000000000000, 900000000000000), }"),
            "damaged",
        ),
        (b"\x93NUMPY\x01\x00\xff\xff", "no array file"),
        (b"\x93NUMPY\x01\x00\xff\xff  {}", "was cut off"),
        (b"", "no array file"),
    ],
)
def test_arrays_are_no_larger_than_their_bytes(seen, tmp_path, raw, message):
    with pytest.raises(FileFormatError, match=message):
        Statistics.load(with_members(seen, tmp_path / "wrong.stats", {f"{FIRST}/counts.npy": raw}))


def test_what_unpacks_to_far_more_than_it_is_is_not_unpacked(seen, tmp_path):
    bomb = with_members(seen, tmp_path / "bomb.stats", {f"{FIRST}/counts.npy": b"\0" * (100 << 20)})
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(FileFormatError, match="was made to fill the memory"):
        Statistics.load(bomb)


def test_sparse_histograms_are_written_so_that_they_are_read_again(tmp_path):
    path = tmp_path / "sparse.zip"
    members = {"a.npy": b"\0" * (100 << 20), "b.npy": bytes(range(256)) * 8}
    write_archive(path, members)
    assert read_archive(path, "archive") == members


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"kind": "quant2e statistics", "format": 2, "format": 2}', "stands twice"),
        (b'{"kind": "quant2e statistics", "format": NaN}', "NaN is no number of JSON"),
        (b'{"kind": "quant2e statistics", "format": 1' + b"0" * 9000 + b"}", "digits"),
        (b'{"kind": "quant2e statistics", "format": 1e999}', "larger than a float holds"),
        (b'{"kind": "\\ud800"}', "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b"3", "must be an object"),
    ],
)
def test_records_are_strict_json(seen, tmp_path, record, message):
    with pytest.raises(FileFormatError, match=message):
        Statistics.load(with_members(seen, tmp_path / "wrong.stats", {"statistics.json": record}))


WRONG_RECORDS = {
    "batches": (lambda r: r.update(batches=-1), "batches=-1"),
    "half a batch": (lambda r: r.update(batches=2.5), "batches is 2.5, and must be an integer"),
    "a list of states": (lambda r: r.update(states=[]), "states is a list, and must be an object"),
    "one more observer": (lambda r: r["estimators"].update(other="MinMax"), "not of the same observers"),
    "a constant that is none": (lambda r: r["constant"].append("other"), "not of the same observers"),
    "one more buffer": (lambda r: r["states"][FIRST].append("sum"), "does not name the arrays that it holds"),
    "one more key": (lambda r: r.update(author="me"), "'author', which is no part of it"),
}


@pytest.mark.parametrize("kind", WRONG_RECORDS)
def test_records_say_what_their_arrays_are(seen, tmp_path, kind):
    change, message = WRONG_RECORDS[kind]
    with pytest.raises(FileFormatError, match=message):
        Statistics.load(rewritten(seen, tmp_path / "wrong.stats", change))


def test_statistics_are_put_into_observers_of_their_shape_only():
    model = quant2e.calibrate(prepared(), data())
    found, target = Statistics.of(model), prepared()
    weights = next(iter(found.constant))
    fewer = state_with(found.states[FIRST], histogram=lambda t: t.reshape(-1, 2).sum(1))
    for states, message in (
        ({**found.states, FIRST: fewer}, "1024 bins, and it has 2048"),
        (
            {
                **found.states,
                weights: state_with(
                    found.states[weights], min_val=lambda t: t[:0], max_val=lambda t: t[:0], counts=torch.zeros_like
                ),
            },
            "collected with other weights",
        ),
        ({name: state for name, state in found.states.items() if name != FIRST}, "not of the observers of this model"),
    ):
        estimators = {name: found.estimators[name] for name in states}
        with pytest.raises(CalibrationError, match=message):
            replace(found, states=states, estimators=estimators).restore(target)
    assert not any(o.observed for o in measuring(target).values() if not o.frozen)
    with pytest.raises(CalibrationError, match="not of the same observers"):
        found.merge(replace(found, constant=frozenset()))


# ------------------------------------------------------------------------------------------- several processes

CASES = {
    2: (
        *("HistogramObserver", "PerChannelMinMaxObserver", "twice", "uneven"),
        *("failing", "different", "MovingAverageMinMaxObserver"),
    ),
    4: ("HistogramObserver",),
}
REFUSED = {
    "failing": ("failed on another rank", "failed on calibration batch 0"),
    "different": ("different models", "different models"),
    "MovingAverageMinMaxObserver": ("moving average", "moving average"),
}


def on_this_rank(case, rank, size):
    """The statistics that a rank has in the end, or why it has none."""
    kind = {k.__name__: k for k in [*KINDS, MovingAverageMinMaxObserver]}.get(case, HistogramObserver)
    model = prepared(quantizer=Linears(kind))
    shard = data()[rank::size]
    if case == "twice":
        quant2e.calibrate(model, shard[:1])
        shard = shard[1:]
    if case == "uneven":
        shard = data() if rank == 1 else []
    if case == "failing" and rank == 1:
        shard = [torch.zeros(3, 5)]
    if case == "different" and rank == 1:
        model = prepared(quantizer=Linears(MinMaxObserver))
    try:
        return buffers(quant2e.calibrate(model, shard))
    except CalibrationError as error:
        return str(error)


WORKER = """
import json, sys
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_statistics import CASES, on_this_rank
rank, size = int(sys.argv[3]), int(sys.argv[4])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=size)
print(json.dumps({case: on_this_rank(case, rank, size) for case in CASES[size]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", CASES)
def test_many_processes_are_one(tmp_path, size):
    """Also when one rank has no data, and when calibration comes twice; and ranks fail together."""
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank), str(size)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(size)
    ]
    found = [json.loads(process.communicate(timeout=240)[0]) for process in running]
    for case in CASES[size]:
        if case in REFUSED:
            assert all(words in one[case] for one, words in zip(found, REFUSED[case], strict=True)), case
            continue
        kind = {k.__name__: k for k in KINDS}.get(case, HistogramObserver)
        alone = json.loads(json.dumps(buffers(quant2e.calibrate(prepared(quantizer=Linears(kind)), data()))))
        assert [one[case] for one in found] == [alone] * size, case


SCRIPT = """
import json, sys
from pathlib import Path
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_statistics import on_this_rank
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(on_this_rank("HistogramObserver", rank, size)))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_torchrun(tmp_path, size):
    script = tmp_path / "calibrate.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    done = subprocess.run(
        [*torchrun, str(script), str(Path(__file__).parent), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone = json.loads(json.dumps(buffers(quant2e.calibrate(prepared(quantizer=Linears(HistogramObserver)), data()))))
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)] == [alone] * size
