"""The accuracy benchmark without its models: hard versions, shares, targets, tables; and its smallest row."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import quant2e
from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy import table
from benchmarks.accuracy.hard import spread
from benchmarks.accuracy.int8_share import int8_share
from benchmarks.accuracy.nets import CharacterModel, DepthwiseNet, DigitsViT
from benchmarks.accuracy.qat import Trained
from benchmarks.accuracy.row import ALIKE, FLOAT, MENDED, NNCF, PLAIN, REDUCED, TORCHAO, Row
from benchmarks.accuracy.schemes import SCHEMES, W4, W4_ASYMMETRIC, X86, XNNPACK
from benchmarks.accuracy.targets import targets
from benchmarks.accuracy.tuning import Tuned
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config


@pytest.mark.parametrize(
    ("make", "inputs", "outliers"),
    [
        (DepthwiseNet, torch.rand(4, 1, 8, 8), None),
        (DigitsViT, torch.rand(4, 1, 8, 8), 4),
        (lambda: CharacterModel(20), torch.randint(0, 20, (4, 64)), None),
    ],
)
def test_a_hard_version_is_the_same_function_bit_for_bit_with_other_ranges(make, inputs, outliers):
    torch.manual_seed(0)
    model = make().eval()
    hard = spread(model, outliers=outliers)
    assert torch.equal(hard(inputs), model(inputs))
    norms = [(a, b) for a, b in zip(model.modules(), hard.modules(), strict=True) if isinstance(a, nn.LayerNorm)]
    norms = norms or [(model.features[3].body[1], hard.features[3].body[1])]
    factors = norms[0][1].weight / norms[0][0].weight
    assert factors.max() / factors.min() >= 2**9
    assert (factors != 1).sum() == (outliers or (factors != 1).sum())


@pytest.mark.parametrize(("layers", "share"), [((0, 1), 1.0), ((0,), 0.8), ((), 0.0)])
def test_the_share_counts_products_of_two_integers(layers, share):
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))  # 128 and 32 products a row
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    for place in {0, 1} - set(layers):
        quantizer.set_module_name(str(place), None)
    x = torch.randn(4, 8)
    if not layers:
        assert int8_share(quant2e.capture(model, (x,)), (x,)) == 0.0
        return
    prepared = quant2e.prepare_pt2e(quant2e.capture(model, (x,)), quantizer)
    prepared(x)
    assert int8_share(quant2e.convert_pt2e(prepared), (x,)) == share


def _row(model, scheme, method, share=1.0, **measures):
    return Row(model=model, scheme=scheme, method=method, measures=measures, int8_share=share, sqnr_db=20.0)


def test_targets_are_met_or_not_and_say_by_what():
    rows = [
        _row("depthwise, hard", XNNPACK, FLOAT, top1=0.99),
        _row("depthwise, hard", XNNPACK, PLAIN, top1=0.2),
        _row("depthwise, hard", XNNPACK, MENDED, top1=0.987),
        _row("depthwise, hard", XNNPACK, NNCF, top1=0.988),
        _row("minilm", X86, MENDED, 0.96, **{"cosine": 0.9975, "top-1": 0.94}),
        *(_row("characters", scheme, FLOAT, **{"−bits": -2.0}) for scheme in (W4, W4_ASYMMETRIC)),
        *(_row("characters", scheme, PLAIN, **{"−bits": -2.2}) for scheme in (W4, W4_ASYMMETRIC)),
        *(_row("characters", scheme, MENDED, **{"−bits": -2.05}) for scheme in (W4, W4_ASYMMETRIC)),
    ]
    found = {target.what: target for target in targets(rows, [])}
    assert found["depthwise, hard, XNNPACK w8a8"].met
    assert found["depthwise, hard, XNNPACK w8a8, beside NNCF"].met is False
    assert found["depthwise, hard, x86 w8a8"].met is None
    assert found["minilm, x86 w8a8"].met is False
    assert "top-1 0.940" in found["minilm, x86 w8a8"].found
    assert found["characters, w4 in groups of 32"].met
    assert "symmetric 75% of 0.2000 bits" in found["characters, w4 in groups of 32"].found
    failed = [replace(rows[2], measures={}, failed="no memory"), *rows[:2]]
    assert next(iter(targets(failed, []))).found == "no memory"


def test_peers_are_held_against_ours_with_the_same_ranges_and_where_ours_is_behind_it_says_by_how_much():
    rows = [
        _row("vit", X86, FLOAT, top1=0.98),
        _row("vit", X86, MENDED, top1=0.97),
        _row("vit", X86, ALIKE, top1=0.978),
        _row("vit", X86, TORCHAO, top1=0.975),
        _row("vit", X86, REDUCED, top1=0.972),
        _row("vit", XNNPACK, FLOAT, top1=0.98),
        replace(_row("vit", XNNPACK, MENDED, top1=0.98), samples=500),
        _row("vit", XNNPACK, NNCF, top1=0.982),
    ]
    found = {target.what: target for target in targets(rows, []) if "beside" in target.what}
    assert {what.split()[-1] if REDUCED not in what else REDUCED: target.met for what, target in found.items()} == {
        TORCHAO: True, REDUCED: False, NNCF: False,
    }  # fmt: skip
    beside = found[f"vit, {X86}, beside {TORCHAO}"].found
    assert "and with tables and ranges for the machine of its row 97.00%" in beside
    assert (
        "behind by 1 of 500, with all of float's 98.00%: what a model has above float is chance"
        in found[f"vit, {XNNPACK}, beside {NNCF}"].found
    )


def test_rows_as_peers_and_with_reduced_ranges_are_those_of_x86():
    assert SCHEMES[X86].of(ALIKE) is not None
    assert SCHEMES[X86].of(REDUCED) is not None
    assert SCHEMES[XNNPACK].of(ALIKE) is SCHEMES[XNNPACK].of(REDUCED) is SCHEMES[W4].of(NNCF) is None


def test_what_was_not_tried_is_said_once_a_reason():
    why = "the output keeps 31.0 dB, and 30 dB are enough"
    notes = ("equalize: kept, 8 changes", f"smooth: not tried, {why}", f"gptq: not tried, {why}")
    lines = table.row_lines([replace(_row("digits", X86, MENDED, top1=0.9), notes=notes)])
    assert lines[-1].endswith(f"| equalize: kept, 8 changes; the other 2: not tried, {why} |")
    mixed = ("smooth: not tried, no activation", *notes[1:])
    lines = table.row_lines([replace(_row("digits", X86, MENDED, top1=0.9), notes=mixed)])
    assert lines[-1].endswith(f"smooth: not tried, no activation; smooth, gptq: not tried, {why} |")


def test_results_are_kept_and_read_again(tmp_path):
    tuned = Tuned(
        model="vit, hard", scheme=XNNPACK, met=True, metric=0.99, float_metric=0.99, test=0.98, int8_share=0.7,
        trials=5, seconds=3.0, exhaustive_share=0.72, mixes=9, blocks=("a", "b"),
    )  # fmt: skip
    results = accuracy.Results(tmp_path / "found")
    for one in (
        _row("digits", X86, FLOAT, top1=0.9),
        Row(model="digits", scheme=X86, method=NNCF, failed="not | installed"),
        replace(_row("digits", X86, PLAIN, top1=0.8), sqnr_db=math.inf, notes=("a step",)),
        tuned,
        Trained(model="digits", bits=4, method="trained", top1=(0.9, 0.8), step_seconds=0.1),
        Trained(model="digits", bits=4, method="trained by torchao", failed="no"),
    ):
        results.add(one)
    again = accuracy.Results(tmp_path / "found")
    assert (again.ordered(), again.tuned, again.trained) == (results.ordered(), results.tuned, results.trained)
    text = (tmp_path / "found.md").read_text()
    for words in ("failed: not \\| installed", "no error", "85.00% | 80.00% | 90.00% | 100", "after 9 mixes"):
        assert words in text
    assert json.loads((tmp_path / "found.json").read_text())["rows"][1]["sqnr_db"] == "no error"
    table.plot(again.ordered(), tmp_path / "found.svg")
    assert "digits, x86 w8a8" in (tmp_path / "found.svg").read_text()


@pytest.mark.slow
def test_the_quick_run_measures_and_meets_its_target(tmp_path, monkeypatch, capsys):
    accuracy.main(["--quick", "--out", str(tmp_path / "quick")])
    assert "depthwise, hard, XNNPACK w8a8: met" in capsys.readouterr().out
