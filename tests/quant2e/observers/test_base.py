import functools

import pytest
import torch

from quant2e.annotation.specs import QuantizationSpec
from quant2e.observers.base import ObserverBase
from quant2e.observers.measuring import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver


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
        (MinMaxObserver.with_args(x=[1]), MinMaxObserver.with_args(x=[1]), True),  # not hashable itself
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
