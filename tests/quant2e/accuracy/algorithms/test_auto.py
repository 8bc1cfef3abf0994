"""The default ladder: hard nets come back to float with no hint, good ones pay little, guests' quantizers take it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from quant2e.accuracy.algorithms.driver import Driver
from quant2e.accuracy.algorithms.ladder import ENOUGH_DB, attempts_of
from quant2e.errors import Quant2eError
from quant2e.pipeline import quantize
from quantizers import (
    ComposableQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)
from tests.quant2e.accuracy.algorithms.hard_nets import depthwise, images, post_norm, tokens, transformer
from tests.quant2e.annotators import WEIGHT, products

ROOT = Path(__file__).parents[4]
NETS = {"depthwise": (depthwise, images), "transformer": (transformer, tokens)}


def xnnpack(**options):
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, **options))


def x86():
    return X86InductorQuantizer(isa="avx2").set_global(get_default_x86_inductor_quantization_config())


def composed():
    dynamic = XNNPACKQuantizer().set_module_name(
        "head", get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    )
    return ComposableQuantizer([dynamic, XNNPACKQuantizer().set_global(get_symmetric_quantization_config())])


RUNGS = [attempt.algorithm.name for attempt in attempts_of("auto")]

CASES = [
    pytest.param(net, quantizer, id=f"{net} {name}", marks=[] if name == "x86" else pytest.mark.slow)
    for net in NETS
    for name, quantizer in (("x86", x86), ("xnnpack", xnnpack), ("composed", composed))
]


@pytest.mark.parametrize(("net", "quantizer"), CASES)
def test_a_hard_net_comes_back_with_no_hint(net, quantizer):
    make, batches = NETS[net]
    model, data, test = make(hard=True), batches(8), torch.cat(batches(30)[10:])
    plain = quantize(model, data[0], quantizer(), data, min_sqnr_db=None, dynamic_batch=True)
    result = quantize(model, data[0], quantizer(), data, algorithms="auto", dynamic_batch=True)
    assert result.report.sqnr_db >= max(plain.report.sqnr_db + 5, 20)
    assert result.report.int8_mac_share >= min(plain.report.int8_mac_share, 0.95)
    wanted = model(test).argmax(1)
    agree = [(each(test).argmax(1) == wanted).double().mean() for each in (plain, result)]
    assert agree[1] >= max(0.9, agree[0])
    assert [step.name for step in result.report.algorithms] == RUNGS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantizer", "takes"),
    [(x86, "by a division in float that is put in"), (xnnpack, "'div_tensor'")],  # XNNPACK's are there for the sums
)
def test_a_post_norm_net_gets_divisions_where_nothing_in_front_can_take_a_factor(quantizer, takes):
    model, data = post_norm(hard=True), tokens(8)
    result = quantize(model, data[0], quantizer(), data, algorithms="auto", dynamic_batch=True)
    plain, mended = result.report.algorithms[0].before_db, result.report.sqnr_db
    assert plain is not None
    assert plain < ENOUGH_DB - 2.0
    assert mended >= ENOUGH_DB
    step = next(step for step in result.report.algorithms[2:] if step.name == "smooth")
    assert step.outcome == "kept"
    assert any(takes in line for line in step.changes)
    assert result.report.int8_mac_share > 0.9


def test_a_good_net_pays_one_measurement(monkeypatch):
    measured = []
    sqnr = Driver._sqnr
    monkeypatch.setattr(Driver, "_sqnr", lambda *args: measured.append(args) or sqnr(*args))
    model, data = transformer(hard=False), tokens()
    quantizer = products(None, WEIGHT, None)
    plain = quantize(model, data[0], quantizer, data)
    result = quantize(model, data[0], quantizer, data, algorithms="auto")
    assert plain.report.sqnr_db > ENOUGH_DB
    assert len(measured) == 1
    assert torch.equal(result(data[0]), plain(data[0]))
    assert {step.outcome for step in result.report.algorithms} == {"not tried"}
    assert "30 dB are enough" in str(result.report)


def test_what_cannot_help_is_not_tried():
    result = quantize(
        transformer(hard=False), tokens()[0], products(None, WEIGHT, None), tokens(), algorithms="auto"
    ).report
    reasons = {step.name: step.reason for step in result.algorithms}
    assert set(reasons) == set(RUNGS)


def test_it_stands_alone():
    with pytest.raises(Quant2eError, match='"auto" stands alone'):
        quantize(transformer(hard=False), tokens()[0], x86(), tokens(), algorithms=["auto"])


GUESTS = {
    "executorch": """
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer as Q
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config
make = lambda: Q().set_global(get_symmetric_quantization_config(is_per_channel=True))
""",
    "torchao": """
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer as Q
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import get_default_x86_inductor_quantization_config
make = lambda: Q().set_global(get_default_x86_inductor_quantization_config())
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("library", GUESTS)
def test_quantizers_of_other_libraries(library):
    if find_spec(library) is None or find_spec("torchao") is None:
        pytest.skip(f"{library} or torchao is not installed")
    script = f"""
import json, sys
{GUESTS[library]}
from quant2e.pipeline import quantize
from tests.quant2e.accuracy.algorithms.hard_nets import depthwise, images
model, data = depthwise(hard=True), images(8)
plain = quantize(model, data[0], make(), data, min_sqnr_db=None).report
for asked in ("auto", ["equalize", "correct_bias", "reestimate_batch_norm"]):
    report = quantize(model, data[0], make(), data, algorithms=asked, min_sqnr_db=None).report
    steps = [[step.name, step.outcome, step.reason] for step in report.algorithms]
    print("FOUND", json.dumps([plain.sqnr_db, report.sqnr_db, report.int8_mac_share, steps]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    found = [json.loads(line.removeprefix("FOUND ")) for line in run.stdout.splitlines() if line.startswith("FOUND")]
    assert len(found) == 2, run.stderr[-2000:]
    for before, after, share, steps in found:
        assert after >= before + 5
        assert share >= 0.95
        assert not [step for step in steps if step[2].startswith("it failed")]
