"""Eight threads at once: what they get is what one thread gets, and the process is as it was."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import quant2e
from quant2e.isolation import ALONE, IsolatedRandomness, tracing
from quantizers import X86InductorQuantizer, XNNPACKQuantizer
from quantizers.xnnpack import get_symmetric_quantization_config

COUNT = 8


class Small(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def batch(seed):
    return torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def quantized(model, quantizer=None):
    quantizer = quantizer or XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    return quant2e.quantize(model, (batch(0),), quantizer, [batch(seed) for seed in range(3)])


@pytest.fixture(scope="module")
def models():
    return [Small(seed).eval() for seed in range(COUNT)]


@pytest.fixture(scope="module")
def results(models):
    return [quantized(model) for model in models]


@pytest.fixture(scope="module")
def files(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for place, result in enumerate(results):
        result.save(folder / f"{place}.pt2")
    return folder


def at_once(work):
    """Run ``work(place)`` in eight threads; returns what they return, raises the first of their errors."""
    found, errors, start = [None] * COUNT, [], threading.Barrier(COUNT)

    def run(place):
        start.wait()
        try:
            found[place] = work(place)
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def check_equal(result, expected):
    assert str(result.report) == str(expected.report)
    return result, expected


def load(place, models, results, files):
    return check_equal(quant2e.load(files / f"{place}.pt2"), results[place])


def quantize(place, models, results, files):
    return check_equal(quantized(models[place]), results[place])


def quantize_one_model(place, models, results, files):
    return check_equal(quantized(models[0]), results[0])


def save(place, models, results, files):
    results[place].save(files / f"again_{place}.pt2")
    assert (files / f"again_{place}.pt2").read_bytes() == (files / f"{place}.pt2").read_bytes()


def capture(place, models, results, files):
    return quant2e.capture(models[place], (batch(0),)), models[place]


def integer(place, models, results, files):
    assert quant2e.integer_report(quant2e.to_integer(results[place].module)).records


WORK = (load, quantize, save, capture, quantize_one_model, integer)


def flags():
    settings = torch.backends.mkldnn.enabled, torch.get_num_threads(), torch.get_default_dtype()
    return (*settings, nn.Module.__call__, nn.Module.__getattr__, torch.is_grad_enabled())


@pytest.mark.parametrize("work", [*WORK, None], ids=lambda work: work.__name__ if work else "everything")
def test_threads_get_what_one_thread_gets(work, models, results, files):
    before, streams = flags(), (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    pairs = at_once(lambda place: (work or WORK[place % len(WORK)])(place, models, results, files))
    assert flags() == before
    # Not in the threads: while one of them captures, torch switches oneDNN off in the others as well, and the last bit
    # of a float convolution is another.
    for result, expected in filter(None, pairs):
        assert torch.equal(result(batch(9)), expected(batch(9)))
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == streams[1:]


def test_capture_waits_for_the_tensors_that_another_thread_has_exchanged():
    model, captured = Small(0).eval(), []
    real = model.conv.weight
    thread = threading.Thread(target=lambda: captured.append(quant2e.capture(model, (batch(0),))))
    with ALONE:  # as in torch.export
        model.conv.weight = nn.Parameter(real.to("meta"))
        thread.start()
        thread.join(0.5)
        model.conv.weight = real
    thread.join()
    assert torch.equal(captured[0](batch(9)), model(batch(9)))


@pytest.mark.slow
@pytest.mark.inductor
def test_lowerings_and_compiled_calibration_in_threads(models, results, tmp_path):
    lowering = pytest.importorskip("lowering")
    x86 = quantized(models[0], X86InductorQuantizer().set_global("w8a8"))

    def work(place):
        kind = place % 4
        if kind == 0:
            return lowering.to_inductor(x86)
        if kind == 1 and importlib.util.find_spec("executorch"):
            return lowering.to_executorch(results[place])
        if kind == 2 and importlib.util.find_spec("onnxruntime"):
            return lowering.to_onnx(results[place], path=tmp_path / f"{place}.onnx")
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
        prepared = quant2e.prepare_pt2e(quant2e.capture(models[place], (batch(0),)), quantizer)
        return quant2e.calibrate(prepared, [batch(seed) for seed in range(3)], compiled=True)

    before = flags()
    programs = at_once(work)
    assert flags() == before
    calls = at_once(lambda place: [programs[place](batch(seed)) for seed in range(20)])
    for program, found in zip(programs, calls, strict=True):
        assert all(torch.equal(program(batch(seed)), found[seed]) for seed in range(20))


@pytest.mark.slow
def test_one_program_is_called_by_many_threads(results):
    pytest.importorskip("executorch")
    from lowering import to_executorch

    program = to_executorch(results[0])
    expected = [program(batch(seed)) for seed in range(COUNT)]
    for found in at_once(lambda place: [program(batch(seed)) for seed in range(COUNT)]):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def disturbed():
    with tracing():
        os.environ["QUANT2E_TEST"] = "1"
        os.environ.pop("PATH", None)
        sys.setrecursionlimit(4321)
        torch.set_num_threads(torch.get_num_threads() + 1)
        warnings.simplefilter("error")
        logging.getLogger().addHandler(logging.NullHandler())
        draws = torch.rand(3), np.random.rand(3), random.random()
        raise KeyError(draws)


def test_what_is_put_back_is_put_back_after_an_error_too():
    def state():
        handlers = list(logging.getLogger().handlers)
        return dict(os.environ), sys.getrecursionlimit(), list(warnings.filters), handlers, flags(), random.getstate()

    before = state()
    with pytest.raises(KeyError):
        disturbed()
    assert state() == before


def test_a_stream_of_its_own_goes_on_where_it_stopped():
    torch.manual_seed(7)
    expected = [torch.rand(1), torch.rand(1)]
    torch.manual_seed(7)
    isolated, drawn = IsolatedRandomness(), []
    for _ in range(2):
        with isolated:
            drawn.append(torch.rand(1))
    assert drawn == expected
    torch.manual_seed(7)
    assert torch.rand(1) == expected[0]
