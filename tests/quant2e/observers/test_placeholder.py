import pytest
import torch

from quant2e.errors import AnnotationError, CalibrationError
from quant2e.observers.measuring import (
    FixedQParamsObserver,
    NoopObserver,
    PlaceholderObserver,
    RecordingObserver,
    default_dynamic_quant_observer,
    default_placeholder_observer,
)


@pytest.mark.parametrize(
    "observer", [PlaceholderObserver(), NoopObserver(), RecordingObserver(), FixedQParamsObserver(0.5, 0)]
)
def test_input_passes_through(observer):
    x = torch.randn(3)
    assert observer(x) is x


@pytest.mark.parametrize("observer", [PlaceholderObserver(), NoopObserver(), RecordingObserver()])
def test_nothing_is_known_about_the_scale(observer):
    with pytest.raises(CalibrationError, match=f"a {type(observer).__name__} has no scale"):
        observer.calculate_qparams()
    assert not list(observer.buffers())


def test_placeholders():
    plain = PlaceholderObserver()
    assert (plain.dtype, plain.is_dynamic, plain.quant_min, plain.qscheme) == (
        torch.float32,
        False,
        None,
        torch.per_tensor_affine,
    )
    assert default_placeholder_observer(dtype=torch.float16).dtype == torch.float16
    dynamic = default_dynamic_quant_observer()
    assert (dynamic.dtype, dynamic.is_dynamic, dynamic.quant_min, dynamic.quant_max) == (torch.uint8, True, 0, 255)
    filled = PlaceholderObserver(dtype=torch.int8, is_dynamic=True, eps=None, qscheme=torch.per_tensor_symmetric)
    assert (filled.quant_min, filled.quant_max, filled.eps) == (-128, 127, 2**-23)
    with pytest.raises(AnnotationError, match="quant_min=-200"):
        PlaceholderObserver(dtype=torch.int8, quant_min=-200, quant_max=1, is_dynamic=True)


def test_fixed_parameters():
    observer = FixedQParamsObserver(scale=1 / 256, zero_point=-128, dtype=torch.int8, qscheme=None)
    scale, zero_point = observer.calculate_qparams()
    assert (scale.tolist(), zero_point.tolist()) == ([1 / 256], [-128])
    assert (observer.quant_min, observer.quant_max, observer.qscheme) == (-128, 127, torch.per_tensor_affine)
    other = FixedQParamsObserver(scale=1.0, zero_point=0, dtype=torch.int8)
    other.load_state_dict(observer.state_dict())
    assert other.calculate_qparams() == (scale, zero_point)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.0, "zero_point": 0}, "scale=0.0"),
        ({"scale": float("inf"), "zero_point": 0}, "scale=inf"),
        ({"scale": 1.0, "zero_point": 256}, "zero_point=256"),
        ({"scale": 1.0, "zero_point": 0, "quant_min": 1}, "zero_point=0"),
        ({"scale": 1.0, "zero_point": 0, "dtype": torch.float16}, "describe integers"),
        ({"scale": 1.0, "zero_point": 0, "is_dynamic": True}, "static"),
    ],
)
def test_bad_fixed_parameters_are_refused(arguments, message):
    with pytest.raises(AnnotationError, match=message):
        FixedQParamsObserver(**arguments)


def test_recording():
    observer = RecordingObserver()
    x = torch.ones(2, requires_grad=True)
    observer(x)
    observer(torch.zeros(1))
    assert [t.tolist() for t in observer.get_tensor_value()] == [[1.0, 1.0], [0.0]]
    assert not observer.tensor_val[0].requires_grad
