import functools
import inspect

import pytest
import torch

from quant2e.annotation.specs import QuantizationSpec
from quant2e.errors import AnnotationError
from quant2e.observers.base import ObserverBase
from quant2e.observers.fake_quant import FakeQuantize, FixedQParamsFakeQuantize, FusedMovingAvgObsFakeQuantize
from quant2e.observers.learned_fake_quant import LearnableFakeQuantize
from quant2e.observers.measuring import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    NoopObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)
from quant2e.observers.per_group import PerGroupMinMaxObserver
from quantizers.x86.paired_ranges import PairedWeightObserver


def _on_cpu():
    return MinMaxObserver.with_args(factory_kwargs={"device": "cpu"})  # an argument that is not hashable itself


def test_with_args_chains_and_the_last_argument_wins():
    factory = MinMaxObserver.with_args(quant_min=0, quant_max=15).with_args(quant_max=7)
    observer = factory(dtype=torch.uint8)
    assert isinstance(observer, MinMaxObserver)
    assert (observer.quant_min, observer.quant_max, observer.dtype) == (0, 7, torch.uint8)
    assert factory(quant_max=3).quant_max == 3
    assert factory() is not factory()


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (MinMaxObserver.with_args(eps=1e-3), MinMaxObserver.with_args(eps=1e-3), True),
        (
            MinMaxObserver.with_args(quant_min=0, quant_max=7),
            MinMaxObserver.with_args(quant_max=7).with_args(quant_min=0),
            True,
        ),
        (MinMaxObserver.with_args(eps=1e-3), MinMaxObserver.with_args(eps=1e-4), False),
        (MinMaxObserver.with_args(eps=1e-3), HistogramObserver.with_args(eps=1e-3), False),
        (MinMaxObserver.with_args(), MinMaxObserver.with_args().with_callable_args(eps=float), False),
        (MinMaxObserver.with_args(), MinMaxObserver, False),
        (_on_cpu(), _on_cpu(), True),
    ],
)
def test_equality(a, b, equal):
    assert (a == b) is equal
    if equal:
        assert hash(a) == hash(b)
        specs = [QuantizationSpec(torch.int8, factory) for factory in (a, b)]
        assert specs[0] == specs[1]
        assert len(set(specs)) == 1


def test_callable_arguments_are_computed_for_each_observer():
    epsilons = iter([0.25, 0.5])
    factory = MinMaxObserver.with_callable_args(eps=lambda: next(epsilons)).with_args(quant_min=0, quant_max=7)
    assert [factory().eps, factory(eps=2.0).eps, factory().eps] == [0.25, 2.0, 0.5]


def test_tools_find_the_class():
    factory = PerChannelMinMaxObserver.with_args(ch_axis=1)
    assert isinstance(factory.p, functools.partial)
    assert factory.p.func is PerChannelMinMaxObserver
    assert factory.p.keywords == {"ch_axis": 1}
    assert repr(factory) == "PerChannelMinMaxObserver.with_args(ch_axis=1)"


def test_an_observer_needs_both_methods():
    with pytest.raises(TypeError, match="abstract"):
        ObserverBase(torch.int8)


UNKNOWN = [
    (lambda: HistogramObserver(foo=1), "HistogramObserver takes no argument 'foo'; it takes bins"),
    (lambda: HistogramObserver(bin=64), "did you mean 'bins'"),
    (lambda: HistogramObserver.with_args(methode="mse"), "did you mean 'method'"),
    (lambda: HistogramObserver.with_args(bins=64).with_args(quant_mn=0), "did you mean 'quant_min'"),
    (lambda: MinMaxObserver.with_callable_args(epsilon=float), "MinMaxObserver takes no argument 'epsilon'"),
    (lambda: PlaceholderObserver(dtyp=torch.int8), "did you mean 'dtype'"),
    (lambda: NoopObserver(foo=1), "NoopObserver takes no argument 'foo'; it takes custom_op_name, dtype"),
    (lambda: FixedQParamsObserver.with_args(scal=1.0), "did you mean 'scale'"),
    (lambda: PerGroupMinMaxObserver(32, group=32), "did you mean 'group_size'"),
    (lambda: MovingAverageMinMaxObserver(averaging=0.1), "did you mean 'averaging_constant'"),
    (lambda: FakeQuantize(quant_mim=0), "did you mean 'quant_min'"),
    (lambda: FakeQuantize(MinMaxObserver, averaging_constant=1), "takes no argument 'averaging_constant'"),
    (lambda: FakeQuantize.with_args(observer=HistogramObserver, bin=64), "did you mean 'bins'"),
    (lambda: FakeQuantize.with_args(observer=HistogramObserver.with_args(bins=64), metod="mse"), "mean 'method'"),
    (lambda: FusedMovingAvgObsFakeQuantize(observr=MovingAverageMinMaxObserver), "did you mean 'observer'"),
    (lambda: LearnableFakeQuantize(MinMaxObserver, use_grad_scale=True), "did you mean 'use_grad_scaling'"),
    (lambda: FixedQParamsFakeQuantize(FixedQParamsObserver, zero_point=0), "takes no argument 'zero_point'"),
    (lambda: PairedWeightObserver(ch_axes=0), "did you mean 'ch_axis'"),
]


@pytest.mark.parametrize(("make", "said"), UNKNOWN)
def test_an_argument_that_nothing_takes_is_an_error_with_the_nearest_name(make, said):
    with pytest.raises(AnnotationError, match=said):
        make()


class Halving(HistogramObserver):
    """Somebody's observer, which takes an argument of its own out of those it hands on."""

    def __init__(self, **kwargs):
        self.factor = kwargs.pop("factor", 2)
        super().__init__(**kwargs)


def test_an_observer_of_ones_own_takes_what_it_says_and_no_more():
    assert Halving(factor=4, bins=16).factor == 4
    assert Halving.with_args(factor=4)().factor == 4
    assert FakeQuantize(Halving, factor=4).activation_post_process.factor == 4
    with pytest.raises(AnnotationError, match="did you mean 'bins'"):
        Halving(binz=16)


def test_the_signature_is_that_of_the_constructor():
    assert "bins" in inspect.signature(HistogramObserver).parameters
    assert inspect.signature(PlaceholderObserver).parameters["custom_op_name"].default == ""
