"""tune: what must stay float is found in few trials, and everything that a user's metric can do wrong is told."""

from __future__ import annotations

import itertools
import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import quant2e
from quant2e.errors import AccuracyError, CalibrationError, Quant2eError
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

BAD = (2, 7, 12)
DEPTH = 16


class Spread(nn.Module):
    """Linears in a row; the rows of some span two decades, which is undone behind them in float."""

    def __init__(self, depth: int = DEPTH, bad: tuple[int, ...] = BAD) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.bad = bad
        spread = torch.logspace(-1.5, 1.5, 8)
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)
        for index in bad:
            self.layers[index].weight.data *= spread[:, None]
            self.layers[index].bias.data *= spread
        self.register_buffer("undo", 1.0 / spread)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            x = torch.tanh(x * self.undo if index in self.bad else x)
        return x


def batches(count: int = 4, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, 8, generator=generator) for _ in range(count)]


def xnnpack(**settings: bool) -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**settings))


class Closeness:
    """1 minus the relative error against float; counts its calls."""

    def __init__(self, model: nn.Module, higher_is_better: bool = True) -> None:
        self.data = batches(2, seed=2)
        self.wanted = [model(x).detach() for x in self.data]
        self.calls = 0
        self.higher_is_better = higher_is_better

    def __call__(self, model) -> float:
        self.calls += 1
        noise = sum(float((model(x) - y).square().sum()) for x, y in zip(self.data, self.wanted, strict=True))
        error = math.sqrt(noise / sum(float(y.square().sum()) for y in self.wanted))
        return 1.0 - error if self.higher_is_better else 0.1 + error


@pytest.fixture(scope="module")
def three():
    model = Spread().eval()
    evaluate = Closeness(model)
    return model, evaluate, quant2e.tune(model, batches()[:1], xnnpack(), batches(), evaluate, max_drop=0.05)


def test_the_three_ops_that_must_stay_float_are_found(three):
    _, evaluate, result = three
    assert result.met
    assert result.left_float == tuple(f"linear_{index}" for index in BAD)
    assert result.metric >= 0.95 > result.trials[0].metric
    assert evaluate.calls == 1 + len(result.trials)


def test_in_a_third_of_the_trials_of_leave_one_out(three):
    _, _, result = three
    groups = set(result.choices) | set(result.left_float)
    assert len(result.trials) * 3 <= len([op for op in groups if op.startswith("linear")])


def test_the_model_is_the_trial_bit_for_bit_and_a_quantized_model(three, tmp_path):
    model, evaluate, result = three
    assert evaluate(result.model.module) == result.metric
    assert not result.model.module.training
    report = result.model.report
    assert {verdict.op.name for verdict in report.verdicts if "tune" in verdict.reason} == set(result.left_float)
    assert report.int8_mac_share == result.best.int8_share < 1.0
    assert report.quantized_bytes == result.best.size_bytes
    assert report.sqnr_db > 20.0
    result.model.save(tmp_path / "tuned.pt2")
    x = batches()[0]
    assert torch.equal(quant2e.load(tmp_path / "tuned.pt2")(x), result.model(x))


def test_it_is_what_a_configuration_without_these_layers_gives(three):
    model, _, result = three
    quantizer = xnnpack()
    for index in BAD:
        quantizer.set_module_name(f"layers.{index}", None)
    wanted = quant2e.quantize(model, batches()[:1], quantizer, batches())
    x = batches(1, seed=5)[0]
    assert torch.equal(wanted(x), result.model(x))
    assert wanted.report.int8_mac_share == result.model.report.int8_mac_share


def test_it_is_told(three):
    _, _, result = three
    assert str(result).startswith("TuningResult: the goal is met; metric 0.9")
    assert "3 ops left float: linear_2, linear_7, linear_12" in repr(result)
    assert "<table>" in result._repr_html_()
    assert result.as_dict()["met"] is True
    assert result.pareto[0].metric == max(trial.metric for trial in result.trials)
    assert all(trial.met is (trial.metric >= 0.95) for trial in result.trials)


def small() -> tuple[nn.Module, list[torch.Tensor]]:
    return Spread(3, (1,)).eval(), batches()


@pytest.mark.parametrize("strategy", ["sensitivity", "bisect", "mse", "exhaustive"])
def test_every_strategy_finds_it(strategy):
    model, data = small()
    result = quant2e.tune(model, data[:1], xnnpack(), data, Closeness(model), max_drop=0.1, strategy=strategy)
    assert (result.met, result.left_float) == (True, ("linear_1",)), str(result)


@pytest.mark.slow
def test_the_share_is_that_of_the_best_of_all_choices():
    """Layers of different sizes, so that which ones stay float matters."""

    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            sizes = [8, 24, 16, 40, 8, 8]
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
            for layer, spread in zip(self.layers, (0.2, 1.0, 0.6, 0.9, 0.1), strict=True):
                layer.weight.data *= torch.logspace(-spread, spread, layer.out_features)[:, None]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    model, data = Sizes().eval(), batches()
    evaluate = Closeness(model)
    for max_drop in (0.05,):
        found, best = (
            quant2e.tune(model, data[:1], xnnpack(), data, evaluate, max_drop=max_drop, strategy=strategy)
            for strategy in ("sensitivity", "exhaustive")
        )
        assert found.met
        assert best.met
        assert found.best.int8_share >= best.best.int8_share - 0.05
        assert len(found.trials) < len(best.trials) / 2


def test_a_metric_that_is_better_when_lower_and_absolute_drops():
    model, data = small()
    evaluate = Closeness(model, higher_is_better=False)
    result = quant2e.tune(
        model, data[:1], xnnpack(), data, evaluate, max_drop=0.1, relative=False, higher_is_better=False
    )
    assert result.met
    assert result.metric <= 0.2
    assert result.left_float == ("linear_1",)
    assert "at most 0.2" in str(result)


def test_one_trial():
    model, data = small()
    result = quant2e.tune(model, data[:1], xnnpack(), data, Closeness(model), max_drop=0.1, max_trials=1)
    assert not result.met
    assert result.left_float == ()
    assert "the goal is not met" in str(result)
    assert "max_trials=1" in str(result)


def test_time_that_is_up():
    model, data = small()
    result = quant2e.tune(model, data[:1], xnnpack(), data, Closeness(model), max_drop=0.1, timeout=1e-9)
    assert len(result.trials) == 1
    assert result.stopped == "stopped by the timeout"


def test_an_interruption_returns_the_best_so_far():
    model, data = small()
    evaluate = Closeness(model)

    def interrupted(module) -> float:
        if evaluate.calls == 2:
            raise KeyboardInterrupt
        return evaluate(module)

    result = quant2e.tune(model, data[:1], xnnpack(), data, interrupted, max_drop=0.1)
    assert (len(result.trials), result.stopped, result.met) == (1, "interrupted", False)
    evaluate.calls = 2
    with pytest.raises(KeyboardInterrupt):
        quant2e.tune(model, data[:1], xnnpack(), data, interrupted, max_drop=0.1)


@pytest.mark.parametrize(
    "wrap",
    [
        torch.tensor,
        np.float32,
        np.float64,
        lambda x: np.array([x]),
        np.array,
        lambda x: torch.tensor([[x]], requires_grad=True),
        lambda x: torch.tensor(x).bfloat16(),
        Fraction,
        Decimal,
    ],
)
def test_numbers_of_all_kinds(wrap):
    model, data = small()
    evaluate = Closeness(model)
    result = quant2e.tune(model, data[:1], xnnpack(), data, lambda m: wrap(evaluate(m)), max_drop=0.1, max_trials=1)
    assert isinstance(result.metric, float)


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        (lambda m: 1 / 0, "fails on the float model.*ZeroDivisionError"),
        (lambda m: math.nan, "returns nan for the float model"),
        (lambda m: -math.inf, "returns -inf for the float model"),
        (lambda m: None, "returned nothing: return one number"),
        (lambda m: torch.zeros(2), r"tensor of shape \[2\]"),
        (lambda m: torch.zeros(0), r"tensor of shape \[0\]"),
        (lambda m: torch.zeros((), device="meta"), "cannot be called on meta tensors"),
        (lambda m: np.zeros((2, 1)), "returned a ndarray: return one number"),
        (lambda m: "0.9", "returned a text, '0.9': return one number"),
        (lambda m: np.str_("0.9"), "returned a text, '0.9'"),
        (lambda m: 1j, "returned a complex"),
        (lambda m: {"top1": 0.9, "top5": 1.0}, "returned a dict of 'top1', 'top5': return one number"),
        (lambda m: (0.9, 0.1), "returned a tuple"),
        (lambda m: 10**400, "OverflowError"),
        (lambda: 1.0, "takes 0 positional arguments but 1 was given"),
        (lambda m: 0.0, "is 0, of which no part can be kept: pass relative=False, and max_drop= in units"),
        ("accuracy", "evaluate is a str: a function"),
    ],
)
def test_a_float_model_without_a_metric(evaluate, said):
    model, data = small()
    with pytest.raises(Quant2eError, match=said):
        quant2e.tune(model, data[:1], xnnpack(), data, evaluate)


def is_quantized(model):
    return any("quantize" in str(node.target) for node in model.graph.nodes)


@pytest.mark.parametrize(
    ("found", "higher_is_better", "said"),
    [
        (math.nan, True, "evaluate returned NaN"),
        (math.inf, True, "evaluate returned inf, which is better than any number"),
        (-math.inf, False, "evaluate returned -inf, which is better than any number"),
        ("0.9", True, "evaluate returned a text, '0.9'"),
        (None, True, "evaluate returned nothing"),
    ],
)
def test_that_the_float_model_alone_has_a_metric_is_an_error(found, higher_is_better, said):
    """A search that ends with everything float, because nothing else could be measured, has found nothing."""
    model, data = small()
    with pytest.raises(Quant2eError, match=rf"evaluate failed on each of \d+ quantized models, .*: {said}"):
        quant2e.tune(
            model,
            data[:1],
            xnnpack(),
            data,
            lambda m: found if is_quantized(m) else 0.5,
            higher_is_better=higher_is_better,
        )


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_infinity_is_what_a_collapsed_model_may_have(higher_is_better):
    model, data = small()
    bad = -math.inf if higher_is_better else math.inf
    arguments = (model, data[:1], xnnpack(), data, lambda m: bad if is_quantized(m) else 0.5)
    result = quant2e.tune(*arguments, higher_is_better=higher_is_better)
    assert (result.met, result.choices, result.metric) == (True, {}, 0.5)
    assert {trial.metric for trial in result.trials} == {bad, 0.5}
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["trials"][0]["metric"] == str(bad)
    if higher_is_better:
        with pytest.raises(AccuracyError, match="the goal is kept only with every op left float"):
            quant2e.quantize(*arguments[:-1], evaluate=arguments[-1])


@pytest.mark.parametrize("failure", [ValueError("input contains NaN"), math.nan])
def test_a_trial_without_a_metric_is_told_and_the_search_goes_on(failure):
    model, data = small()
    evaluate = Closeness(model)

    def sometimes(module) -> float:
        found = evaluate(module)
        if found < 0.9 and isinstance(failure, Exception):
            raise failure
        return found if found >= 0.9 else failure

    result = quant2e.tune(model, data[:1], xnnpack(), data, sometimes, max_drop=0.1)
    assert result.met
    assert result.trials[0].failed
    assert "NaN" in result.trials[0].error
    assert "failed" in str(result)


def test_a_metric_that_fails_on_every_quantized_model():
    model, data = small()

    def picky(module) -> float:
        if any("quantize" in str(node.target) for node in module.graph.nodes):
            raise TypeError("not this one")
        return 1.0

    with pytest.raises(Quant2eError, match="failed on each of 1 quantized models.*not this one") as caught:
        quant2e.tune(model, data[:1], xnnpack(), data, picky, max_trials=1)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_goal_that_nothing_keeps_returns_the_best_metric():
    model, data = small()
    seen = []

    def strict(module) -> float:
        seen.append(module)
        return 1.0 if len(seen) == 1 else 0.5 + 0.01 * len(seen)

    result = quant2e.tune(model, data[:1], xnnpack(), data, strict, max_drop=0.0)
    assert not result.met
    assert result.metric == max(trial.metric for trial in result.trials)


def test_nothing_to_tune():
    model, data = small()
    with pytest.raises(Quant2eError, match="no op of this model is quantized.*set_global"):
        quant2e.tune(model, data[:1], XNNPACKQuantizer(), data, Closeness(model))


def test_dynamic_quantizers_need_no_data():
    model, data = small()
    quantizer = xnnpack(is_dynamic=True, is_per_channel=True)
    result = quant2e.tune(model, data[:1], quantizer, None, Closeness(model), max_drop=0.1)
    assert result.met
    assert {verdict.kind for verdict in result.model.report.verdicts if verdict.op.macs} == {"dynamic"}


def test_models_that_draw_random_numbers_draw_the_same_in_each_trial():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)) + torch.randn(8))

    model, data = Noisy().eval(), batches()
    wanted = []

    def evaluate(module) -> float:
        found = module(data[0])
        wanted.append(found)
        return 1.0 - float((found - wanted[0]).norm() / wanted[0].norm())

    state = torch.get_rng_state()
    result = quant2e.tune(model, data[:1], xnnpack(), data, evaluate, max_drop=0.05)
    assert result.met
    assert result.left_float == ()
    assert torch.equal(state, torch.get_rng_state())


def test_trials_are_told_as_they_finish():
    model, data = small()
    told = []
    result = quant2e.tune(model, data[:1], xnnpack(), data, Closeness(model), max_drop=0.1, progress=told.append)
    assert tuple(told) == result.trials


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_drop": -0.1}, "max_drop=-0.1"),
        ({"max_drop": math.nan}, "max_drop=nan"),
        ({"max_trials": 0}, "max_trials=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"strategy": "luck"}, "strategy='luck': one of sensitivity"),
        ({"quantizer": {}}, "empty mapping"),
        ({"quantizer": {"float": xnnpack()}}, "'float' cannot name a quantizer"),
        ({"calibration_data": 3}, "calibration_data is"),
    ],
)
def test_bad_arguments(arguments, said):
    model, data = small()
    called = []
    given = {"quantizer": xnnpack(), "calibration_data": data, **arguments}
    with pytest.raises((Quant2eError, CalibrationError), match=said):
        quant2e.tune(model, data[:1], given.pop("quantizer"), given.pop("calibration_data"), called.append, **given)
    assert called == []


def test_too_many_choices_are_refused_with_their_count():
    model, data = Spread().eval(), batches()
    with pytest.raises(Quant2eError, match=r"would try [\d,]+ choices for \d+ groups"):
        quant2e.tune(model, data[:1], xnnpack(), data, Closeness(model), strategy="exhaustive")


def test_the_short_form():
    model, data = small()
    evaluate = Closeness(model)
    result = quant2e.quantize(model, data[:1], xnnpack(), data, evaluate=evaluate, max_drop=0.1)
    assert evaluate(result.module) >= 0.9
    assert result.report.of("linear_1").reason == "left float by tune"
    with pytest.raises(AccuracyError, match="no mix of precisions"):
        quant2e.quantize(model, data[:1], xnnpack(), data, evaluate=lambda m, seen=[2.0]: seen.append(1.0) or seen[-2])
    with pytest.raises(Quant2eError, match="max_drop= goes with evaluate="):
        quant2e.quantize(model, data[:1], xnnpack(), data, max_drop=0.1)
    with pytest.raises(Quant2eError, match="goes without"):
        quant2e.quantize(model, data[:1], xnnpack(), data, evaluate=evaluate, int8_io=True)


def test_the_short_form_tries_algorithms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    spread = torch.logspace(-1.5, 1.5, 32)
    with torch.no_grad():
        model[0].weight.mul_(spread[:, None])
        model[0].bias.mul_(spread)
        model[2].weight.div_(spread)
    data = [torch.randn(16, 8) for _ in range(4)]
    arguments = {"evaluate": Closeness(model), "max_drop": 0.05, "dynamic_batch": True}
    plain = quant2e.quantize(model, data[:1], xnnpack(), data, **arguments)
    mended = quant2e.quantize(model, data[:1], xnnpack(), data, algorithms=["equalize"], **arguments)
    assert plain.report.int8_mac_share < mended.report.int8_mac_share == 1.0


@pytest.mark.parametrize("strategy", ["random", "bayesian"])
def test_sampling_strategies_find_it_and_are_reproducible(strategy):
    pytest.importorskip("optuna")
    model, data = small()
    arguments = {"max_drop": 0.1, "strategy": strategy, "max_trials": 12}
    first, again = (
        quant2e.tune(model, data[:1], xnnpack(), data, Closeness(model), seed=3, **arguments) for _ in range(2)
    )
    assert first.met
    assert [trial.mix for trial in first.trials] == [trial.mix for trial in again.trials]
    assert len({trial.mix for trial in first.trials}) == len(first.trials)


def test_optuna_that_is_missing_is_named(monkeypatch):
    import sys

    model, data = small()
    monkeypatch.setitem(sys.modules, "optuna", None)
    for arguments in ({"strategy": "bayesian"}, {"storage": "trials.log"}):
        with pytest.raises(Quant2eError, match=r"need Optuna.*quant2e\[tune\]"):
            quant2e.tune(model, data[:1], xnnpack(), data, Closeness(model), **arguments)
