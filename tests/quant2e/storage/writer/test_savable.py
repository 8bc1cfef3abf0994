"""What can be saved: graphs with and without values, from here and elsewhere; what is refused, with the place."""

import copy
import operator
import pickle

import pytest
import torch
from torch import nn
from torch.export import Dim

from quant2e import capture, load, prepare_pt2e, quantize, save
from quant2e.errors import Quant2eError
from quant2e.storage.writer.savable import savable
from tests.quant2e.annotators import DYNAMIC, products

X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Module):
    """A linear layer, keyword and nested inputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, more, *, scale):
        return self.linear(x) * scale + more["a"][0]


def model(shapes=None):
    torch.manual_seed(0)
    quantizer = products(act=DYNAMIC, output=None)
    arguments = (X, {"a": [torch.ones(4)]})
    return quantize(
        Net().eval(), arguments, quantizer, kwargs={"scale": torch.ones(4)}, dynamic_shapes=shapes
    )  # fmt: skip


ANY_BATCH = {"x": {0: Dim("n", min=2, max=9)}, "more": {"a": [None]}, "scale": None}


def test_a_graph_with_values_is_saved_as_it_is():
    made = model()
    assert savable(made.module, made.example_inputs, made.example_kwargs, None) is made.module


def test_values_that_are_missing_are_worked_out(tmp_path):
    made = model(ANY_BATCH)
    bare = copy.deepcopy(made.module)
    known = {}
    for node in bare.graph.nodes:
        if node.op in ("call_function", "get_attr"):
            known[node.name] = node.meta.pop("val", None)
    graph = savable(bare, made.example_inputs, made.example_kwargs, made.dynamic_shapes)
    assert all("val" not in node.meta for node in bare.graph.nodes if node.op == "call_function")
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            value, old = node.meta["val"], known[node.name]
            if isinstance(old, torch.Tensor):
                assert (value.dtype, str(value.shape)) == (old.dtype, str(old.shape))


def test_a_graph_that_was_pickled(tmp_path):
    made = model()
    again = pickle.loads(pickle.dumps(made.module))
    made.module = again
    made.save(tmp_path / "m.pt2")
    arguments = (X * 2, {"a": [torch.ones(4)]})
    assert torch.equal(load(tmp_path / "m.pt2")(*arguments, scale=X[0]), again(*arguments, scale=X[0]))


def test_a_graph_of_torch_export_itself(tmp_path):
    program = torch.export.export(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (X,), dynamic_shapes=({0: Dim("n", max=9)},)
    )
    save(program.module(), tmp_path / "m.pt2", (X,))
    again = load(tmp_path / "m.pt2")
    assert torch.equal(again(X[:2]), program.module()(X[:2]))
    with pytest.raises(Quant2eError, match="<= 9"):
        again(torch.zeros(10, 4))


def test_a_graph_that_torchao_converted(tmp_path):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e as convert
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e as prepare

    from quantizers.torchao import as_torchao

    prepared = prepare(torch.export.export(nn.Linear(4, 4).eval(), (X,)).module(), as_torchao(products()))
    prepared(X)
    converted = convert(prepared)
    save(converted, tmp_path / "m.pt2", (X,))
    assert torch.equal(load(tmp_path / "m.pt2")(X), converted(X))


def test_a_prepared_graph_is_refused(tmp_path):
    prepared = prepare_pt2e(capture(nn.Linear(4, 4).eval(), X), products())
    with pytest.raises(Quant2eError, match="is no op: a file holds graphs of ops, so convert this one first"):
        save(prepared, tmp_path / "m.pt2", (X,))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": {0: Dim("n")}}, "size 0 of the input x varies by dynamic_shapes, and the graph was captured for 3"),
        (({1: Dim.DYNAMIC}, None, None), "size 1 of the input x"),
        (((None, Dim("n")), None, None), "size 1 of the input x"),
        ({"more": {"a": [{0: Dim("n")}]}}, r"size 0 of the input more\['a'\]\[0\]"),
        ((None, {"a": ((Dim("n"),),)}, None), r"size 0 of the input more\['a'\]\[0\]"),
        ((None, None, {0: 2 * Dim("n")}), "size 0 of the input scale"),
    ],
)
def test_sizes_that_should_vary_and_do_not(tmp_path, shapes, message):
    made = model()
    made.dynamic_shapes = shapes
    with pytest.raises(Quant2eError, match=message):
        made.save(tmp_path / "m.pt2")


@pytest.mark.parametrize(
    "shapes",
    [None, {}, (), {"x": None}, ({0: Dim.AUTO}, None, None), ({0: 3, 1: None},), ({0: Dim.STATIC}, {"a": None}, None)],
)
def test_sizes_that_need_not_vary(shapes):
    made = model()
    assert savable(made.module, made.example_inputs, made.example_kwargs, shapes) is made.module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X,), "missing more, scale"),
        ((X[:, :2], {"a": [X[0]]}, X[0]), r"x.size\(\)\[1\] == 4"),
        ((X, {"b": [X[0]]}, X[0]), "not nested as at capture"),
    ],
)
def test_example_inputs_that_do_not_fit(tmp_path, arguments, message):
    with pytest.raises(Quant2eError, match=f"cannot be saved with these example inputs: .*{message}"):
        save(model().module, tmp_path / "m.pt2", arguments)
