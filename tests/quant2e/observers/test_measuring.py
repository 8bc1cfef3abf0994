import copy
import math
import pickle
from functools import reduce

import pytest
import torch
import torchao.quantization.pt2e.observer as peer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from quant2e.errors import AnnotationError, CalibrationError
from quant2e.observers import measuring as ours
from quant2e.observers.measuring import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelHistogramObserver,
    PerChannelMinMaxObserver,
)

PER_TENSOR = [MinMaxObserver, MovingAverageMinMaxObserver, HistogramObserver]
PER_CHANNEL = [PerChannelMinMaxObserver, MovingAveragePerChannelMinMaxObserver]
ALL = PER_TENSOR + PER_CHANNEL

shapes = st.shared(array_shapes(min_dims=2, max_dims=3, max_side=5), key="shape")
floats = st.one_of(
    st.floats(-100, 100, width=32), st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99), st.just(0.0)
)
batches = st.lists(arrays("float32", shapes, elements=floats), min_size=1, max_size=3)
DTYPES = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.qint8, torch.quint8]
BOUNDS = [
    {},
    {"quant_min": 0, "quant_max": 100},
    {"eps": 2**-12},
    {"reduce_range": True, "quant_min": -20, "quant_max": 90},
]


@settings(max_examples=150, deadline=None)
@given(
    batches,
    st.sampled_from(["MinMaxObserver", "MovingAverageMinMaxObserver", *[c.__name__ for c in PER_CHANNEL]]),
    st.sampled_from(DTYPES),
    st.sampled_from(BOUNDS),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore:.*Please use quant_min and quant_max:UserWarning")
def test_parameters_are_bit_equal_to_the_peers(data, name, dtype, bounds, symmetric):
    if bounds.get("quant_min", 0) < 0 and "uint" in str(dtype):
        return
    kind = "per_channel" if "PerChannel" in name else "per_tensor"
    arguments = {
        "dtype": dtype,
        "qscheme": getattr(torch, f"{kind}_{'symmetric' if symmetric else 'affine'}"),
        **bounds,
    }
    if kind == "per_channel":
        arguments["ch_axis"] = 1
    mine, theirs = getattr(ours, name)(**arguments), getattr(peer, name)(**arguments)
    for x in map(torch.tensor, data):
        assert mine(x) is x
        theirs(x)
    scale, zero_point = mine.calculate_qparams()
    expected_scale, expected_zero_point = theirs.calculate_qparams()
    assert torch.equal(scale, expected_scale)
    if dtype == torch.uint16 and symmetric and bounds:
        return  # theirs is 32768, outside the given range
    if dtype == torch.int32 and not symmetric:
        return  # theirs overflows
    assert zero_point.tolist() == expected_zero_point.tolist()


def test_float_zero_points_are_bit_equal_to_the_peers():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    mine = PerChannelMinMaxObserver(dtype=torch.quint8, qscheme=torch.per_channel_affine_float_qparams, ch_axis=0)
    pair = [peer.default_float_qparams_observer(), mine]
    for observer in pair:
        observer(x)
    for a, b in zip(*(o.calculate_qparams() for o in pair), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name",
    [
        "default_observer",
        "default_weight_observer",
        "default_per_channel_weight_observer",
        "default_histogram_observer",
        "default_dynamic_quant_observer",
        "default_placeholder_observer",
    ],
)
def test_defaults_mean_what_the_peers_mean(name):
    mine, theirs = getattr(ours, name)(), getattr(peer, name)()
    plain = {torch.quint8: torch.uint8, torch.qint8: torch.int8}
    assert mine.dtype == plain.get(theirs.dtype, theirs.dtype)
    for attribute in ("quant_min", "quant_max", "qscheme", "is_dynamic"):
        assert getattr(mine, attribute) == getattr(theirs, attribute)


@pytest.mark.parametrize("cls", ALL)
def test_none_means_the_default(cls):
    fields = dict.fromkeys(["dtype", "qscheme", "quant_min", "quant_max", "eps", "is_dynamic", "ch_axis"])
    observer = cls.with_args(**fields)()
    assert (observer.dtype, observer.quant_min, observer.quant_max, observer.eps) == (torch.uint8, 0, 255, 2**-23)
    assert observer.ch_axis == (0 if cls in PER_CHANNEL else None)
    assert observer.is_dynamic is False


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (MinMaxObserver, {"qscheme": torch.per_channel_affine}, "this observer takes torch.per_tensor_affine or"),
        (
            PerChannelMinMaxObserver,
            {"qscheme": torch.per_tensor_affine},
            "this observer takes torch.per_channel_affine or",
        ),
        (MinMaxObserver, {"quant_min": 0}, "give both"),
        (MinMaxObserver, {"dtype": torch.float16}, "dtype=torch.float16"),
        (MinMaxObserver, {"dtype": torch.int8, "quant_min": 0, "quant_max": 255}, "quant_max <= 127"),
        (MinMaxObserver, {"quant_min": 1, "quant_max": 255}, "must include 0"),
        (MinMaxObserver, {"reduce_range": True, "qscheme": torch.per_tensor_symmetric}, "outside the reduced range"),
        (MovingAverageMinMaxObserver, {"averaging_constant": 0}, "averaging_constant=0"),
        (MovingAverageMinMaxObserver, {"is_dynamic": True}, "dynamic quantization has no history"),
        (PerChannelMinMaxObserver, {"ch_axis": -1}, "ch_axis=-1"),
        (PerChannelMinMaxObserver, {"is_dynamic": True}, "per-channel dynamic"),
        (MovingAveragePerChannelMinMaxObserver, {"averaging_constant": 1.5}, "averaging_constant=1.5"),
        (HistogramObserver, {"is_dynamic": True}, "needs calibration data"),
        (HistogramObserver, {"method": "kl"}, "choose one of"),
        (HistogramObserver, {"percentile": 0}, "percentile=0"),
        (HistogramObserver, {"bins": 1}, "bins=1"),
    ],
)
def test_bad_arguments_are_refused(cls, arguments, message):
    with pytest.raises(AnnotationError, match=message):
        cls(**arguments)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.int8, -64, 63), (torch.uint8, 0, 127), (torch.int16, -32768, 32767)]
)
def test_reduced_range(dtype, low, high):
    observer = MinMaxObserver(dtype=dtype, reduce_range=True)
    assert (observer.quant_min, observer.quant_max) == (low, high)


def test_four_bits_of_torch_are_stored_in_eight():
    observer = MinMaxObserver(dtype=torch.quint4x2)
    assert (observer.dtype, observer.quant_min, observer.quant_max) == (torch.uint8, 0, 15)


@pytest.mark.parametrize("cls", ALL)
def test_no_data_is_an_error(cls):
    observer = cls()
    for x in (None, torch.empty(0, 3), torch.full((2, 3), -math.inf)):
        if x is not None:
            observer(x)
        assert not observer.observed
        with pytest.raises(CalibrationError, match="masked" if observer.total else "no data was seen"):
            observer.calculate_qparams()
    assert (observer.total, observer.masked_count) == (6, 6)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(("value", "counts"), [(math.nan, (1, 0, 0)), (math.inf, (0, 1, 0)), (-math.inf, (0, 0, 1))])
def test_non_finite_values_are_counted(cls, value, counts):
    observer = cls()
    observer(torch.tensor([[1.0, 2.0], [3.0, value]]))
    assert (observer.nan_count, observer.posinf_count, observer.masked_count) == counts
    assert observer.total == 4
    assert observer.max_val.max() == 3
    if value == -math.inf:
        assert observer.calculate_qparams()[0].isfinite().all()
    else:
        with pytest.raises(CalibrationError, match=rf"{counts[0]} NaN and {counts[1]} \+inf among 4 values"):
            observer.calculate_qparams()


def test_a_channel_without_data_is_an_error():
    observer = PerChannelMinMaxObserver()
    observer(torch.tensor([[1.0, 2.0], [-math.inf, -math.inf]]))
    with pytest.raises(CalibrationError, match="1 of 2 channels"):
        observer.calculate_qparams()


def filled(cls, seed=0):
    observer = cls()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        observer(torch.randn(4, 50, generator=generator))
    return observer


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.calculate_qparams(), b.calculate_qparams(), strict=True))


@pytest.mark.parametrize("cls", ALL)
def test_statistics_travel(cls):
    observer = filled(cls)
    for other in (copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))):
        assert same(other, observer)
        other(torch.full((4, 1), 100.0))
        assert not same(other, observer)
    fresh = cls()
    empty = fresh.state_dict()
    fresh.load_state_dict(observer.state_dict())
    assert same(fresh, observer)
    fresh.load_state_dict(cls().state_dict())
    assert not fresh.observed
    former = {**observer.state_dict(), "peaks": torch.zeros(2, 256, dtype=torch.int64)}
    fresh.load_state_dict(former)
    assert same(fresh, observer)
    assert set(empty) <= {"min_val", "max_val", "counts", "histogram"}


@pytest.mark.parametrize("cls", ALL)
def test_statistics_stay_exact_in_half_precision_models(cls):
    observer, reference = filled(cls), filled(cls)
    assert same(observer.half().to(torch.float64).to("cpu"), reference)
    assert observer.min_val.dtype == torch.float32
    assert observer.to("meta").counts.is_meta


@pytest.mark.parametrize("cls", ALL)
def test_frozen_statistics_do_not_change(cls):
    observer, reference = filled(cls), filled(cls)
    x = torch.full((4, 1), 100.0)
    assert observer.freeze().frozen
    assert observer(x) is x
    assert same(observer, reference)


@pytest.mark.parametrize("cls", ALL)
def test_an_observer_only_looks(cls):
    observer = cls()
    x = torch.randn(4, 5, requires_grad=True)
    before, state = x.detach().clone(), torch.get_rng_state()
    assert observer(x) is x
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(b.requires_grad for b in observer.buffers())
    with torch.inference_mode():
        observer(torch.randn(4, 5))
    observer(torch.randn(4, 5))
    with pytest.raises(CalibrationError, match="only floating-point"):
        observer(torch.ones(4, 5, dtype=torch.int64))


@pytest.mark.parametrize("cls", [MinMaxObserver, PerChannelMinMaxObserver, HistogramObserver])
def test_shards_merge_exactly(cls):
    data = [torch.randn(4, 20, generator=torch.Generator().manual_seed(i)) * 3**i for i in range(6)]
    whole = cls()
    for x in data:
        whole(x)
    for order in (range(6), reversed(range(6))):
        shards = [cls(), cls(), cls()]
        for i in order:
            shards[i % 3](data[i])
        merged = reduce(whole.estimator.merge, (shard.state for shard in (*shards[::-1], cls())))
        assert all(torch.equal(getattr(merged, part), value) for part, value in whole.state_dict().items())


def test_what_cannot_merge():
    average, histogram = MovingAverageMinMaxObserver(), HistogramObserver(bins=64)
    with pytest.raises(CalibrationError, match="depend on the order"):
        average.estimator.merge(average.state, average.state)
    with pytest.raises(CalibrationError, match="64 and 2048 bins cannot be merged"):
        histogram.estimator.merge(histogram.state, HistogramObserver().state)


def test_the_state_is_a_copy():
    observer = filled(HistogramObserver)
    state = observer.state
    total = state.histogram.sum()
    observer(torch.ones(5))
    assert state.histogram.sum() == total
    assert observer.estimator.update(state, torch.ones(5)).histogram.sum() == total + 5


def test_forgetting():
    for cls in ALL:
        observer = filled(cls)
        observer.reset_min_max_vals()
        assert not observer.observed
        assert torch.equal(observer.min_val, cls().min_val)


def test_one_calibration_many_methods():
    x = torch.distributions.Laplace(0.0, 1.0).sample((100_000,))
    observer = HistogramObserver(dtype=torch.int8, qscheme=torch.per_tensor_symmetric)
    observer(x)
    scales = {}
    for method in ("minmax", "mse", "percentile", "entropy"):
        fresh = HistogramObserver(dtype=torch.int8, qscheme=torch.per_tensor_symmetric, method=method)
        fresh(x)
        observer.method = method
        assert same(observer, fresh)
        scales[method] = observer.calculate_qparams()[0].item()
    assert scales["minmax"] == pytest.approx(x.abs().max().item() / 127.5)
    assert max(scales["mse"], scales["percentile"], scales["entropy"]) < scales["minmax"]


def test_representation():
    assert repr(MinMaxObserver()) == "MinMaxObserver(torch.uint8, [0, 255], torch.per_tensor_affine, no data)"
    assert "min_val=-1.0, max_val=2.0" in repr(filled_with([-1.0, 2.0]))


def filled_with(values):
    observer = MinMaxObserver()
    observer(torch.tensor(values))
    return observer


@pytest.mark.parametrize("method", ["mse", "percentile", "entropy", "minmax"])
def test_a_histogram_per_channel_is_one_of_each(method):
    x = torch.randn(3, 500) * torch.tensor([[1.0], [10.0], [0.1]])
    scheme = {"dtype": torch.int8, "quant_min": -8, "quant_max": 7, "method": method}
    together = PerChannelHistogramObserver(qscheme=torch.per_channel_affine, **scheme)
    together(x[:, :300])
    together(x[:, 300:])
    for i, found in enumerate(zip(*together.calculate_qparams(), strict=True)):
        alone = HistogramObserver(qscheme=torch.per_tensor_affine, **scheme)
        alone(x[i])
        assert [v.item() for v in found] == [v.item() for v in alone.calculate_qparams()]
    again = PerChannelHistogramObserver(qscheme=torch.per_channel_affine, **scheme)
    again.load_state_dict(together.state_dict())
    assert torch.equal(again.calculate_qparams()[0], together.calculate_qparams()[0])
