import math

import pytest
import torch
from torch import nn

from lowering import Bound, Verification, verify
from lowering.verify import output_scales
from quant2e.errors import LoweringError
from tests.lowering.graphs import Cnn, on_grid

X = torch.linspace(-1, 1, 9)


class Ends(nn.Module):
    """x on a grid of 0.1, moved around."""

    def forward(self, x):
        return on_grid(x, (0.1, 0)).view(3, 3).transpose(0, 1)


def graph(module, *inputs):
    return torch.export.export(module.eval(), inputs, strict=False).module()


def test_same_function_is_zero_steps_and_infinite_sqnr():
    reference = graph(Ends(), X)
    found = verify(reference, reference, [X, X])
    assert (found.max_steps, found.max_abs_diff, found.sqnr_db, found.batches) == (0.0, 0.0, math.inf, 2)
    assert found.passed


@pytest.mark.parametrize(("off", "steps"), [(0.1, 1.0), (0.2, 2.0), (0.05, 0.5)])
def test_differences_are_counted_in_steps_of_the_output_scale(off, steps):
    reference = graph(Ends(), X)
    found = verify(lambda x: reference(x) + off, reference, [X])
    assert found.max_steps == pytest.approx(steps, rel=1e-5)
    assert found.max_abs_diff == pytest.approx(off, rel=1e-5)
    assert found.step_rule == "steps of the output's scale"


def test_sqnr_is_ten_log_ten_of_signal_over_noise():
    identity = nn.Identity()
    reference, noise = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    found = verify(lambda x: x + noise, identity, [reference])
    assert found.sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))


def test_a_float_output_is_measured_in_255ths_of_its_range():
    found = verify(lambda x: x + 2.0 / 255, nn.Identity(), [X])
    assert found.max_steps == pytest.approx(1.0, rel=1e-3)
    assert found.step_rule == "steps of 1/255 of the output's range"


@pytest.mark.parametrize(
    ("steps", "sqnr", "bound", "passed"),
    [
        (1.0, 3.0, Bound(), True),
        (1.5, 39.9, Bound(), False),
        (1.5, 40.0, Bound(), True),
        (9.0, 25.0, Bound(sqnr_db=20.0), True),
        (2.0, 3.0, Bound(steps=2.0), True),
    ],
)
def test_either_side_of_the_bound_is_enough(steps, sqnr, bound, passed):
    found = Verification(
        max_steps=steps, max_abs_diff=1.0, sqnr_db=sqnr, mismatches=0.0, batches=1, step_rule="steps", bound=bound
    )
    assert found.passed is passed
    assert str(found).startswith("passed" if passed else "FAILED")


def test_check_raises_with_the_numbers():
    found = verify(lambda x: -x, nn.Identity(), [X])
    with pytest.raises(LoweringError, match=r"the program does not compute .* FAILED: 255 step\(s\).*SQNR -6.0 dB"):
        found.check("the program")


@pytest.mark.parametrize(
    ("got", "expected", "sqnr"),
    [
        ([math.inf, 1.0], [math.inf, 1.0], math.inf),
        ([math.nan, 1.0], [math.nan, 1.0], math.inf),
        ([0.0, 1.0], [math.inf, 1.0], -math.inf),
        ([math.nan, 1.0], [0.0, 1.0], -math.inf),
    ],
)
def test_not_finite_is_equal_only_to_itself(got, expected, sqnr):
    found = verify(lambda *_: torch.tensor(got), lambda_module(lambda *_: torch.tensor(expected)), [X])
    assert found.sqnr_db == sqnr
    assert found.passed is (sqnr == math.inf)


class lambda_module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def test_integer_outputs_are_counted_apart():
    reference = lambda_module(lambda x: (x, x > 0))
    found = verify(lambda x: (x, x > 0.5), reference, [X])
    assert found.mismatches == pytest.approx(2 / 9)
    assert not found.passed
    assert "22.22% of the integer outputs differ" in str(found)
    assert verify(lambda x: (x, x > 0.0), reference, [X]).passed


def test_a_quantized_output_differs_in_integers():
    class Ends(nn.Module):
        def forward(self, x):
            return torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.1, 0, -128, 127, torch.int8)

    reference = graph(Ends(), X)
    assert verify(lambda x: reference(x) + 1, reference, [X]).max_steps == 1.0


@pytest.mark.parametrize(
    ("lowered", "message"),
    [
        (lambda x: (x, x), r"returns 2 value\(s\), its Q/DQ graph 1"),
        (lambda x: x[:2], r"has shape \(2,\), its Q/DQ graph's \(9,\)"),
        (lambda *_: 1.0, "output 0: float instead of Tensor"),
    ],
)
def test_another_structure_is_an_error(lowered, message):
    with pytest.raises(LoweringError, match=message):
        verify(lowered, nn.Identity(), [X])


def test_no_data_is_an_error():
    with pytest.raises(LoweringError, match="no batches"):
        verify(nn.Identity(), nn.Identity(), [])


def test_a_reference_that_writes_to_its_input_leaves_the_data_alone():
    data = [X.clone()]
    found = verify(lambda x: x + 1, lambda_module(lambda x: x.add_(1)), data)
    assert found.sqnr_db == math.inf
    assert torch.equal(data[0], X)


def test_output_scales():
    x = torch.randn(1, 3, 8, 8)
    assert output_scales(graph(Cnn(), x)) == [0.01]
    assert output_scales(graph(lambda_module(lambda x: (x.relu(), on_grid(x, (0.5, 0)))), x)) == [None, 0.5]
    assert output_scales(nn.Identity()) == []


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.swapaxes(0, 1),
        lambda x: x.unflatten(1, (3, 1)),
        lambda x: x.flip(0),
        lambda x: x.chunk(3, 1)[1],
        lambda x: x.split(1)[0].expand(2, 3),
        lambda x: x.repeat(1, 2).detach(),
    ],
)
def test_an_output_has_the_scale_of_what_was_moved_there(move):
    assert output_scales(graph(lambda_module(lambda x: move(on_grid(x.view(3, 3), (0.25, 0)))), X)) == [0.25]


def test_one_of_several_results_of_arithmetic_has_no_scale():
    assert output_scales(graph(lambda_module(lambda x: on_grid(x, (0.25, 0)).max(0)[0]), X)) == [None]


def test_a_quantized_model_is_known_by_its_module():
    class Quantized:
        module = graph(Ends(), X)

    assert verify(Quantized.module, Quantized(), [X]).passed
    with pytest.raises(LoweringError, match="cannot lower or compare a str"):
        verify(nn.Identity(), "model", [X])
