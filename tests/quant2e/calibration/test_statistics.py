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
        "format": (lambda r: r.update(format=3), "format 3; this version reads quant2e statistics of formats 1 and 2"),
        "kind": (lambda r: r.update(kind="a poem"), "holds a poem"),
        "state": (lambda r: r.pop("states"), "is no statistics file, or is damaged"),
        "estimator": (lambda r: r["estimators"].update(activation_post_process_0="exit()"), "is none of MinMax"),
        "other": (
            lambda r: r["estimators"].update(activation_post_process_0="MinMax"),
            "are not those of a MinMax",
        ),
    }
    for name, (change, message) in changes.items():
        with pytest.raises(FileFormatError, match=message):
            load_statistics(target, rewritten(path, tmp_path / name, change))
    found = Statistics.load(path)
    for part, value in {"max_val": torch.zeros(2), "histogram": torch.zeros(2, 8, dtype=torch.int64)}.items():
        state = {**found.states["activation_post_process_0"], part: value}
        replace(found, states={**found.states, "activation_post_process_0": state}).save(tmp_path / "shape")
        with pytest.raises(FileFormatError, match="do not have the shapes of a Histogram"):
            load_statistics(target, tmp_path / "shape")
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
