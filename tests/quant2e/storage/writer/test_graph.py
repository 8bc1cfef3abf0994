"""Graphs as JSON: the text of small ones, every kind of operand, and what is refused, with the place."""

import json

import pytest
import torch
from torch import nn
from torch._export.serde.schema import SCHEMA_VERSION as TORCH_SCHEMA
from torch._export.serde.serialize import (
    _TORCH_TO_SERIALIZE_DTYPE,
    _TORCH_TO_SERIALIZE_LAYOUT,
    _TORCH_TO_SERIALIZE_MEMORY_FORMAT,
    GraphModuleSerializer,
)
from torch.fx import Graph, GraphModule

from quant2e import capture
from quant2e.errors import Quant2eError
from quant2e.storage.reader.schema_numbers import DTYPES, LAYOUTS, MEMORY_FORMATS
from quant2e.storage.writer.graph import qualified_name, write_graph
from quant2e.storage.writer.program import program_records
from quant2e.storage.writer.values import Values
from quant2e.versions import SCHEMA

aten = torch.ops.aten


def test_numbers_are_those_of_torch():
    assert {dtype: int(number) for dtype, number in _TORCH_TO_SERIALIZE_DTYPE.items()} == dict(DTYPES)
    assert {form: int(number) for form, number in _TORCH_TO_SERIALIZE_MEMORY_FORMAT.items()} == dict(MEMORY_FORMATS)
    assert all(int(_TORCH_TO_SERIALIZE_LAYOUT[layout]) == number for layout, number in LAYOUTS.items())
    assert SCHEMA[0] == TORCH_SCHEMA[0]
    assert SCHEMA <= TORCH_SCHEMA


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.add.Tensor, "torch.ops.aten.add.Tensor"),
        (aten.linear.default, "torch.ops.aten.linear.default"),
        (torch.ops.higher_order.cond, "torch.ops.higher_order.cond"),
        (torch.sym_max, "torch.sym_max"),
    ],
)  # fmt: skip
def test_names_of_targets(target, name):
    import operator

    assert qualified_name(target) == name
    assert GraphModuleSerializer.serialize_operator(None, target) == name
    assert qualified_name(operator.mul) == "_operator.mul"


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, x):
        values, places = self.linear(x).topk(2)
        return values.flatten(), places


def records(module, *inputs, **options):
    return dict(program_records(capture(module.eval(), inputs, **options)))


def test_the_text_of_a_program(golden):
    program = json.loads(
        records(Small(), torch.ones(4, 2), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=8)},))[
            "models/model.json"
        ]
    )
    program["torch_version"] = "2"
    program["opset_version"] = {}
    for node in program["graph_module"]["graph"]["nodes"]:
        assert node["metadata"].pop("stack_trace").startswith('File "test_graph.py", line ')
    golden("files/program", json.dumps(program, indent=1))


def graph_of(target, *args, value=None, **kwargs):
    """A graph of one op, whose operands may be the names of two tensors, a number and a truth value."""
    graph = Graph()
    named = {}
    for name, given in (("a", torch.ones(2)), ("b", torch.ones(2))):
        named[name] = graph.placeholder(name)
        named[name].meta["val"] = given
    replace = lambda v: named.get(v, v) if isinstance(v, str) else [replace(i) for i in v] if isinstance(v, list) else v
    node = graph.call_function(target, tuple(replace(arg) for arg in args), {k: replace(v) for k, v in kwargs.items()})
    node.meta["val"] = torch.ones(2) if value is None else value
    graph.output((node,))
    return GraphModule({}, graph).graph


def operands(*args, target=aten.add.Tensor, **kwargs):
    (node,) = write_graph(graph_of(target, *args, **kwargs), {}, Values(), lambda node: {})["nodes"]
    return {entry["name"]: (entry["arg"], entry.get("kind")) for entry in node["inputs"]}


def operand(value):
    """The JSON of one operand of something that has no schema."""
    (entry,) = operands(value, target=torch.ops.higher_order.cond).values()
    return entry[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", {"as_tensor": {"name": "a"}}),
        (["a", "b"], {"as_tensors": [{"name": "a"}, {"name": "b"}]}),
        (["a", None], {"as_optional_tensors": [{"as_tensor": {"name": "a"}}, {"as_none": True}]}),
        ([["a"], ["b"]], {"as_nested_tensors": [[{"name": "a"}], [{"name": "b"}]]}),
        (None, {"as_none": True}),
        (True, {"as_bool": True}),
        (3, {"as_int": 3}),
        (-0.0, {"as_float": -0.0}),
        (float("inf"), {"as_float": "Infinity"}),
        (float("-inf"), {"as_float": "-Infinity"}),
        (float("nan"), {"as_float": "NaN"}),
        (1 - 2j, {"as_complex": {"real": 1.0, "imag": -2.0}}),
        ("mean", {"as_string": "mean"}),
        ([1, 2], {"as_ints": [1, 2]}),
        ([1.0, float("inf")], {"as_floats": [1.0, "Infinity"]}),
        ([True, False], {"as_bools": [True, False]}),
        (["x", "y"], {"as_strings": ["x", "y"]}),
        ([[1, 2], [3]], {"as_int_lists": [[1, 2], [3]]}),
        ([[1.0]], {"as_float_lists": [[1.0]]}),
        ([], {"as_tensors": []}),
        (torch.int8, {"as_scalar_type": 2}),
        (torch.device("cpu"), {"as_device": {"type": "cpu"}}),
        (torch.device("cuda", 1), {"as_device": {"type": "cuda", "index": 1}}),
        (torch.strided, {"as_layout": 7}),
        (torch.channels_last, {"as_memory_format": 2}),
    ],
    ids=str,
)
def test_operands(value, text):
    assert repr(operand(value)) == repr(text)


def test_where_operands_were_given():
    assert operands("a", "b") == {
        "self": ({"as_tensor": {"name": "a"}}, None),
        "other": ({"as_tensor": {"name": "b"}}, None),
    }
    assert operands("a", other="b")["other"] == ({"as_tensor": {"name": "b"}}, 2)
    assert operands("a", "b", alpha=2)["alpha"] == ({"as_int": 2}, None)
    assert operands("a", [1], target=aten.flip.default)["dims"] == ({"as_ints": [1]}, None)
    assert operands("a", "a", "b", target=aten.linear.default)["bias"] == ({"as_tensor": {"name": "b"}}, 1)
    assert operands("a", "a", bias="b", target=aten.linear.default)["bias"] == ({"as_tensor": {"name": "b"}}, None)
    assert operands("a", [], target=aten.sum.dim_IntList)["dim"] == ({"as_ints": []}, None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"k": 1}, "an operand is a dict"),
        (slice(1), "an operand is a slice"),
        ([1, "x"], "a list of int, str"),
        ([[1], "x"], "a list of list, str"),
        ([[1, "x"]], "a list of lists holds tensors, integers or floats only"),
        (torch.sparse_coo, "an operand is a layout"),
        (torch.quint8, "cannot hold torch.quint8"),
    ],
    ids=str,
)
def test_what_a_file_cannot_hold(value, message):
    with pytest.raises(Quant2eError, match=f"'cond' .* cannot be saved: .*{message}"):
        operand(value)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2).to_sparse(), "strided tensors, and this one is torch.sparse_coo"),
        (torch.ones(2, dtype=torch.uint8).view(torch.bits8), "cannot hold torch.bits8"),
    ],
    ids=["sparse", "bits"],
)
def test_results_that_a_file_cannot_hold(tensor, message):
    with pytest.raises(Quant2eError, match=f"'add_tensor' .* cannot be saved: .*{message}"):
        write_graph(graph_of(aten.add.Tensor, "a", "b", value=tensor), {}, Values(), lambda node: {})


class Holds(nn.Module):
    def __init__(self, tensor):
        super().__init__()
        self.register_buffer("odd", tensor)
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    "tensor", [torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex64).conj()]
)
def test_tensors_that_a_file_cannot_hold(tensor):
    gm = capture(Holds(torch.ones(2)).eval(), torch.ones(1, 2))
    gm.register_buffer("odd", tensor)
    with pytest.raises(Quant2eError, match="'odd' is a .*: a file holds plain tensors only"):
        dict(program_records(gm))


def test_tensors_that_share_memory_share_a_record_and_others_are_cut_to_what_is_used():
    gm = capture(Holds(torch.ones(2)).eval(), torch.ones(1, 2))
    large = torch.arange(1000.0)
    gm.register_buffer("low", large[10:14].view(2, 2).t())
    gm.register_buffer("high", large[12:15])
    gm.register_buffer("far", large[500:502])
    gm.register_buffer("none", large[:0])
    found = dict(program_records(gm))
    config = json.loads(found["data/weights/model_weights_config.json"])["config"]
    sizes = {name: len(found[f"data/weights/{entry['path_name']}"]) for name, entry in config.items()}
    assert (sizes["low"], sizes["high"], sizes["far"], sizes["none"]) == (20, 20, 8, 0)
    assert config["low"]["path_name"] == config["high"]["path_name"] != config["far"]["path_name"]
    assert config["high"]["tensor_meta"]["storage_offset"] == {"as_int": 2}
    assert config["far"]["tensor_meta"]["storage_offset"] == {"as_int": 0}
