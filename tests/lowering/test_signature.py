import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowering.signature import Signature, TensorInput, signature_of
from quant2e.errors import LoweringError


class Two(nn.Module):
    def forward(self, x, options, *, mask=None, flag=True):
        y = x * options["gain"] if flag else x
        return {"y": y + mask, "none": None, "pair": (x, 3)}


X, GAIN, MASK = torch.ones(4, 3), torch.ones(3), torch.zeros(4, 3)


@pytest.fixture(scope="module")
def fixed():
    exported = torch.export.export(Two(), (X, {"gain": GAIN}), {"mask": MASK, "flag": True}, strict=False)
    return Signature(exported.module(), None)


@pytest.fixture(scope="module")
def dynamic():
    batch = torch.export.Dim("batch", min=3, max=16)
    shapes = ({0: batch}, {"gain": None}, {0: batch}, None)
    kwargs = {"mask": MASK, "flag": True}
    names = dict(zip(("x", "options", "mask", "flag"), shapes, strict=True))
    exported = torch.export.export(Two(), (X, {"gain": GAIN}), kwargs, dynamic_shapes=names, strict=False)
    return Signature(exported.module(), None)


def call(signature, x=X, gain=GAIN, mask=MASK, flag=True):
    return signature.sizes(signature.flatten((x, {"gain": gain}), {"flag": flag, "mask": mask}))


def test_inputs_are_flat_in_captured_order_whatever_the_order_of_keywords(fixed):
    values = fixed.flatten((X, {"gain": GAIN}), {"flag": True, "mask": MASK})
    assert [v is w for v, w in zip(values, (X, GAIN, MASK, True), strict=True)] == [True] * 4
    assert [spec.taken for spec in fixed.inputs] == [True, True, True, False]


def test_any_input_may_be_given_by_name(fixed):
    values = fixed.flatten((), {"flag": True, "options": {"gain": GAIN}, "mask": MASK, "x": X})
    assert [v is w for v, w in zip(values, (X, GAIN, MASK, True), strict=True)] == [True] * 4
    call = fixed.structured(values)
    assert (len(call.args), list(call.kwargs)) == (2, ["mask", "flag"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.to("meta"), "a tensor without data"),
        (lambda x: FakeTensorMode().from_tensor(x), "a tensor without data"),
        (lambda x: x.to_sparse(), "a tensor of layout sparse_coo"),
        (lambda x: x.to_sparse_csr(), "a tensor of layout sparse_csr"),
        (lambda x: x.to_mkldnn(), "a tensor of layout _mkldnn"),
        (lambda x: torch.nested.nested_tensor([x, x]), "a nested tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_whose_memory_no_runtime_can_be_given(fixed, change, said):
    """Some of them ended the process in ExecuTorch's runtime."""
    with pytest.raises(LoweringError, match=f"input 'x' is {said}, and must be an ordinary one"):
        call(fixed, x=change(X))
    takes = TensorInput(name="x", dtype=X.dtype, sizes=((4, 4), (3, 3)))
    assert takes.takes(X)
    assert not takes.takes(change(X))


class Counted(nn.Module):
    def forward(self, count, x):
        return x * count


def test_an_exported_program_and_its_graph_are_called_alike():
    """Constants keep their place: torch.export lists them among the inputs by value, not by name."""
    batch = torch.export.Dim("batch", min=1, max=8)
    shapes = (None, {0: batch})
    signature = signature_of(torch.export.export(Counted(), (3, X), dynamic_shapes=shapes, strict=False))
    assert [spec.name for spec in signature.inputs] == ["count", "x"]
    assert list(signature.symbols.values()) == [(1.0, 8.0)]
    assert signature.plain((3, X), {})[1].shape == X.shape
    for args, message in [
        ((2, X), "'count' is 2, and the graph was captured with 3"),
        ((3, torch.ones(9, 3)), r"size is 9, outside of \[1, 8\]"),
        ((3, torch.ones(0, 3)), r"size is 0, outside of \[1, 8\]"),
    ]:
        with pytest.raises(LoweringError, match=message):
            signature.plain(args, {})


def test_outputs_are_put_back_together_with_what_is_no_tensor(fixed):
    assert fixed.unflatten([X, GAIN]) == {"y": X, "none": None, "pair": (GAIN, 3)}


def test_symbols_and_their_values(fixed, dynamic):
    assert fixed.symbols == {}
    assert list(dynamic.symbols.values()) == [(3.0, 16.0)]
    assert call(fixed) == ()
    assert call(dynamic, torch.ones(7, 3), mask=torch.ones(7, 3)) == (7,)


@pytest.mark.parametrize(
    ("which", "inputs", "message"),
    [
        ("fixed", {"x": torch.ones(5, 3)},
            (r"dimension 0 of input 'x' is 5, and the program was compiled "
            r"for 4: .*dynamic_shapes")),
        ("fixed", {"x": torch.ones(4)}, r"'x' has 1 dimension\(s\), and must have 2"),
        ("fixed", {"x": torch.ones(4, 3).double()}, "dtype torch.float64, and must have torch.float32"),
        ("fixed", {"x": 3}, "'x' is a int, and must be a tensor"),
        ("fixed", {"flag": False}, "'flag' is False, and the graph was captured with True"),
        ("dynamic", {"x": torch.ones(5, 3)}, "dimension 0 of input 'mask' is 4, and must be 5"),
        ("dynamic", {"x": torch.ones(2, 3), "mask": torch.ones(2, 3)}, r"size is 2, outside of \[3, 16\]"),
        ("dynamic", {"x": torch.ones(17, 3), "mask": torch.ones(17, 3)}, r"size is 17, outside of \[3, 16\]"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_named(which, inputs, message, request):
    with pytest.raises(LoweringError, match=message):
        call(request.getfixturevalue(which), **inputs)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X, {"gain": GAIN}), {"mask": MASK}, r"takes \(x, options, mask, flag\), missing flag"),
        ((X, {"loss": GAIN}), {"mask": MASK, "flag": True}, "not nested as at capture"),
        ((X,), {"mask": MASK, "flag": True}, r"takes \(x, options, mask, flag\), missing options"),
        ((X, {"gain": GAIN}), {"mask": MASK, "flag": True, "bias": X}, "and 'bias' is not one of them"),
    ],
)  # fmt: skip
def test_another_structure_is_refused(args, kwargs, message, fixed):
    with pytest.raises(LoweringError, match=message):
        fixed.flatten(args, kwargs)


def test_example_inputs_of_another_number_are_refused():
    exported = torch.export.export(nn.ReLU(), (X,), strict=False).module()
    with pytest.raises(LoweringError, match=r"takes 1 input\(s\), \['input'\], and the example inputs hold 2"):
        Signature(exported, [X, X])
