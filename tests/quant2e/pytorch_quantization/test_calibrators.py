"""Calibrators: maxima and histograms along any axes, several methods from one collection, and what raises."""

from __future__ import annotations

import pytest
import torch

from quant2e.errors import AnnotationError, CalibrationError
from quant2e.pytorch_quantization import HistogramCalibrator, MaxCalibrator, fake_tensor_quant

X = torch.randn(64, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), (1, 2), (0, 1, 2)])
def test_maxima_along_axes(axis):
    calibrator = MaxCalibrator(8, axis)
    calibrator.collect(X)
    calibrator.collect(X * 0.5)
    kept = () if axis is None else {each % 3 for each in ((axis,) if isinstance(axis, int) else axis)}
    rest = [each for each in range(3) if each not in kept]
    expected = X.abs().amax(rest, keepdim=True) if rest else X.abs()
    amax = calibrator.compute_amax()
    assert amax.shape == (() if axis is None else expected.shape)
    assert torch.equal(amax.flatten(), expected.flatten())
    assert fake_tensor_quant(X, amax).shape == X.shape


def heavy_tailed():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20000, generator=generator)
    return torch.where(torch.rand(20000, generator=generator) < 1e-4, x * 30, x)


def test_one_collection_serves_every_method():
    x = heavy_tailed()
    calibrator = HistogramCalibrator(8)
    for part in x.split(1000):
        calibrator.collect(part)
    found = {method: float(calibrator.compute_amax(method)) for method in ("max", "entropy", "percentile", "mse")}
    assert found["max"] == float(x.abs().max())
    assert all(found[method] < found["max"] for method in ("entropy", "percentile", "mse"))
    assert float(calibrator.compute_amax("percentile", percentile=100)) == found["max"]
    wanted = float(x.abs().kthvalue(int(20000 * 0.9999)).values)
    width = found["max"] / 1024
    assert abs(found["percentile"] - wanted) < 2 * width
    errors = {method: float((fake_tensor_quant(x, amax) - x).square().mean()) for method, amax in found.items()}
    assert errors["mse"] == min(errors.values())


def test_collections_do_not_depend_on_the_order_of_batches():
    x = heavy_tailed()
    amaxs = []
    for order in (x.split(1000), reversed(x.split(1000))):
        calibrator = HistogramCalibrator(8)
        for part in order:
            calibrator.collect(part)
        amaxs.append(float(calibrator.compute_amax("mse")))
    assert amaxs[0] == amaxs[1]


def test_a_histogram_for_each_channel_is_the_histogram_of_that_channel():
    whole = HistogramCalibrator(8, axis=1)
    whole.collect(X)
    for method in ("entropy", "percentile", "mse"):
        amax = whole.compute_amax(method)
        assert amax.shape == (1, 6, 1)
        for channel in range(6):
            alone = HistogramCalibrator(8)
            alone.collect(X[:, channel])
            assert float(alone.compute_amax(method)) == float(amax[0, channel, 0])


def test_zeros_are_skipped_as_if_they_were_not_there():
    x = heavy_tailed()
    sparse = torch.where(torch.rand(20000, generator=torch.Generator().manual_seed(2)) < 0.9, 0.0, x)
    skipping, without, counting = (
        HistogramCalibrator(8, skip_zeros=True),
        HistogramCalibrator(8),
        HistogramCalibrator(8),
    )
    skipping.collect(sparse)
    counting.collect(sparse)
    without.collect(sparse[sparse != 0])
    for method in ("entropy", "percentile", "mse"):
        assert float(skipping.compute_amax(method)) == float(without.compute_amax(method))
    assert float(skipping.compute_amax("percentile", percentile=99)) > float(
        counting.compute_amax("percentile", percentile=99)
    )


def test_unsigned_uses_all_integers():
    x = heavy_tailed().abs()
    signed, unsigned = HistogramCalibrator(8), HistogramCalibrator(8, unsigned=True)
    for calibrator in (signed, unsigned):
        calibrator.collect(x)
    fake = {c: fake_tensor_quant(x, c.compute_amax("mse"), 8, c.unsigned) for c in (signed, unsigned)}
    assert (fake[unsigned] - x).square().mean() < (fake[signed] - x).square().mean() / 2


def test_reset_forgets():
    for calibrator in (MaxCalibrator(), HistogramCalibrator()):
        calibrator.collect(X)
        calibrator.reset()
        calibrator.collect(torch.ones(3))
        assert float(calibrator._amax(calibrator._state.min_val, calibrator._state.max_val)) == 1.0


def test_what_raises():
    with pytest.raises(CalibrationError, match="nothing was collected"):
        MaxCalibrator().compute_amax()
    calibrator = MaxCalibrator(8, 0)
    calibrator.collect(torch.ones(3, 2))
    with pytest.raises(CalibrationError, match="amax has the shape"):
        calibrator.collect(torch.ones(4, 2))
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        MaxCalibrator().collect(torch.tensor([1.0, float("nan")]))
    with pytest.raises(AnnotationError, match="not 1 different axes"):
        MaxCalibrator(8, 2).collect(torch.ones(3, 2))
    with pytest.raises(AnnotationError, match="different ones"):
        MaxCalibrator(8, (0, 0))
    with pytest.raises(AnnotationError, match="not 2 different axes"):
        MaxCalibrator(8, (1, -1)).collect(torch.ones(3, 2))
    negative = MaxCalibrator(8, unsigned=True)
    negative.collect(torch.tensor([-1.0, 2.0]))
    with pytest.raises(CalibrationError, match="use signed ones"):
        negative.compute_amax()
    histogram = HistogramCalibrator(skip_zeros=True)
    histogram.collect(torch.zeros(4))
    with pytest.raises(CalibrationError, match="zeros only"):
        histogram.compute_amax()
    histogram.collect(X)
    with pytest.raises(AnnotationError, match="choose one of"):
        histogram.compute_amax("median")
