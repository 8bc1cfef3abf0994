"""Given parameters: whatever asks an observer, and whatever is made from it, has exactly the given numbers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Graph, GraphModule

import quant2e
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import AnnotationError, Quant2eError
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.qdq_ops import qd
from quant2e.observers.base import inner_observer
from quant2e.observers.encodings import PerChannelEncoding, PerGroupEncoding, PerTensorEncoding, RoundedConstant, encode
from quant2e.observers.given import constant_of, give_encoding, give_integers, integers_given, parameters_along
from quant2e.observers.placeholder import FixedQParamsObserver
from quant2e.report.record import record_of
from quantizers.embedding import EmbeddingQuantizer
from quantizers.x86 import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

STATIC = (PerTensorEncoding, PerChannelEncoding, PerGroupEncoding)


class Model(nn.Module):
    """A table and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 32)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(self.table(ids))))


def guest():
    ao = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    return ao.X86InductorQuantizer().set_global(ao.get_default_x86_inductor_quantization_config())


QUANTIZERS = {
    "xnnpack": lambda: XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)),
    "x86": lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
    "groups": lambda: X86InductorQuantizer().set_global("w4-g32"),
    "groups with zero points": lambda: X86InductorQuantizer().set_global("w4-g32-asym"),
    "table": EmbeddingQuantizer,
    "torchao's x86": guest,
}
IDS = torch.arange(10).reshape(2, 5)


def prepared(quantizer) -> GraphModule:
    torch.manual_seed(0)
    graph = quant2e.prepare_pt2e(quant2e.capture(Model().eval(), (IDS,)), quantizer)
    return quant2e.calibrate(graph, [IDS])


def static(graph: GraphModule) -> dict:
    found = {name: encode(graph.get_submodule(name)) for name in record_of(graph).observers}
    return {name: encoding for name, encoding in found.items() if isinstance(encoding, STATIC)}


def moved(encoding):
    """Another scale, and zero points one further up."""
    return replace(encoding, scale=encoding.scale * 2, zero_point=encoding.zero_point + 1)


def constants(graph: GraphModule) -> list:
    """Calls of observers of weights."""
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    return [call for call in calls if call.all_input_nodes[0].op == "get_attr" and str(call.target) in static(graph)]


@pytest.mark.parametrize("name", [*list(QUANTIZERS)[:-1], pytest.param("torchao's x86", marks=pytest.mark.slow)])
def test_conversion_and_simulation_have_the_given_numbers(name):
    graph = prepared(QUANTIZERS[name]())
    wanted = {observer: moved(encoding) for observer, encoding in static(graph).items()}
    assert wanted
    again = copy_graph(graph)
    for observer, encoding in wanted.items():
        give_encoding(again, observer, encoding)
    for observer, encoding in static(again).items():
        assert type(encoding) is type(wanted[observer])
        assert repr(encoding) == repr(wanted[observer])
    integers = {}
    for call in constants(again):
        low, high = wanted[str(call.target)].quant_min, wanted[str(call.target)].quant_max
        integers[call.name] = torch.randint(low, high + 1, call.meta["val"].shape, dtype=torch.int8)
        give_integers(again, call, integers[call.name])
    converted = quant2e.convert_pt2e(again)
    found = [b for n, b in converted.named_buffers() if n.endswith("_quantized")]
    assert len(found) == len(integers)
    assert all(any(torch.equal(f, i) for f in found if f.shape == i.shape) for i in integers.values())
    simulated = SimulatedGraph(again)
    with simulated.rounding(list(simulated.points)):
        assert torch.equal(simulated(IDS), converted(IDS))
    assert torch.equal(again(IDS), graph(IDS))
    assert repr(static(graph)) != repr(static(again))


def test_names_of_weights_stay(tmp_path):
    graph = copy_graph(prepared(QUANTIZERS["xnnpack"]()))
    names = [n for n, _ in quant2e.convert_pt2e(graph).named_buffers()]
    for call in constants(graph):
        give_encoding(graph, str(call.target), encode(graph.get_submodule(str(call.target))))
        give_integers(graph, call, torch.zeros(call.meta["val"].shape, dtype=torch.int8))
    converted = quant2e.convert_pt2e(graph)
    assert [n for n, _ in converted.named_buffers()] == names
    quant2e.save(converted, tmp_path / "model.pt2", (IDS,))
    assert torch.equal(quant2e.load(tmp_path / "model.pt2")(IDS), converted(IDS))
    assert quant2e.to_integer(converted)(IDS).shape == (2, 5, 4)


def test_what_was_measured_stays_and_copies_are_complete():
    graph = copy_graph(prepared(QUANTIZERS["x86"]()))
    name = next(n for n, e in static(graph).items() if isinstance(e, PerTensorEncoding))
    before = graph.get_submodule(name)
    give_encoding(graph, name, moved(encode(before)))
    give_encoding(graph, name, moved(encode(before)))
    assert inner_observer(graph.get_submodule(name)) is before
    again = copy.deepcopy(graph)
    assert repr(static(again)) == repr(static(graph))
    assert graph.get_submodule(name).half().scale.dtype == torch.float32
    quant2e.calibrate(again, [IDS])
    assert repr(static(again)) == repr(static(graph))


def test_no_data_is_needed():
    graph = copy_graph(quant2e.prepare_pt2e(quant2e.capture(Model().eval(), (IDS,)), QUANTIZERS["xnnpack"]()))
    wanted = static(prepared(QUANTIZERS["xnnpack"]()))
    for name, encoding in wanted.items():
        give_encoding(graph, name, encoding)
    assert repr(static(quant2e.calibrate(graph, [IDS]))) == repr(wanted)
    assert quant2e.convert_pt2e(graph)(IDS).shape == (2, 5, 4)


def test_biases_follow():
    graph = copy_graph(prepared(QUANTIZERS["xnnpack"]()))
    derived = {n: encode(graph.get_submodule(n)) for n in record_of(graph).observers if n not in static(graph)}
    for name, encoding in static(graph).items():
        give_encoding(graph, name, replace(encoding, scale=encoding.scale * 2))
    assert derived
    for name, encoding in derived.items():
        assert isinstance(encoding, RoundedConstant)
        assert torch.equal(encode(graph.get_submodule(name)).scale, encoding.scale * 4)


def test_fake_quantizers_stay_ones():
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=True))
    graph = quant2e.prepare_qat_pt2e(quant2e.capture(Model().train(), (IDS,)), quantizer)
    graph(IDS)
    wanted = {name: replace(encoding, scale=encoding.scale * 2) for name, encoding in static(graph).items()}
    for name, encoding in wanted.items():
        give_encoding(graph, name, encoding)
    graph(IDS).sum().backward()
    graph.eval()
    converted = quant2e.convert_pt2e(graph)
    encodings = [e for e in record_of(converted).encodings if isinstance(e, STATIC)]
    assert [repr(e) for e in encodings] == [repr(e) for e in wanted.values()]
    assert torch.equal(converted(IDS), graph(IDS))


def test_bad_input_is_refused():
    graph = copy_graph(prepared(QUANTIZERS["xnnpack"]()))
    call = constants(graph)[0]
    name = str(call.target)
    encoding = encode(graph.get_submodule(name))
    for wrong, message in (
        (replace(encoding, scale=encoding.scale[:3], zero_point=encoding.zero_point[:3]), "3 scales for channels"),
        (replace(encoding, scale=-encoding.scale), "positive, finite"),
        (replace(encoding, zero_point=encoding.zero_point + 200), "zero_point=200"),
        (replace(encoding, zero_point=encoding.zero_point[:1]), "do not pair up"),
        (RoundedConstant(scale=encoding.scale), "no numbers to give"),
    ):
        with pytest.raises(AnnotationError, match=message):
            give_encoding(graph, name, wrong)
    with pytest.raises(Quant2eError, match="no observer"):
        give_encoding(graph, "first", encoding)
    with pytest.raises(Quant2eError, match="no given encoding"):
        give_integers(graph, call, torch.zeros(64, 32, dtype=torch.int8))
    give_encoding(graph, name, encoding)
    with pytest.raises(AnnotationError, match="of the shape"):
        give_integers(graph, call, torch.zeros(2, dtype=torch.int8))
    with pytest.raises(AnnotationError, match="outside of"):
        give_integers(graph, call, torch.full((64, 32), -128, dtype=torch.int8))
    assert integers_given(graph, call) is None


SCALES = st.floats(2.0**-100, 2.0**66, width=32)


@st.composite
def encodings(draw):
    """An encoding for a matrix of 3 rows and 4 columns, and integers within its range."""
    dtype, low, high = draw(
        st.sampled_from(
            [(torch.int8, -8, 7), (torch.int8, -128, 127), (torch.uint8, 0, 255), (torch.int16, -32768, 32767)]
        )
    )
    kind = draw(st.sampled_from(["tensor", "channel", "group", "table"]))
    integers = torch.tensor(draw(st.lists(st.integers(low, high), min_size=12, max_size=12)), dtype=torch.int32)
    count = {"tensor": 1, "channel": 3, "group": 6, "table": 3}[kind]
    scale = torch.tensor(draw(st.lists(SCALES, min_size=count, max_size=count)))
    zeros = st.floats(-300, 300, width=32) if kind == "table" else st.integers(low, high)
    zero = torch.tensor(draw(st.lists(zeros, min_size=count, max_size=count)))
    common = {"quant_min": low, "quant_max": high, "dtype": dtype}
    if kind == "tensor":
        encoding = PerTensorEncoding(scale=float(scale), zero_point=int(zero), **common)
    elif kind == "group":
        encoding = PerGroupEncoding(scale=scale.reshape(3, 2), zero_point=zero.reshape(3, 2), group_size=2, **common)
    else:
        encoding = PerChannelEncoding(scale=scale, zero_point=zero, axis=0, **common)
    return encoding, integers.reshape(3, 4).to(dtype)


def observed_matrix(encoding) -> GraphModule:
    graph, root = Graph(), nn.Module()
    root.register_buffer("weight", torch.ones(3, 4))
    root.add_module("activation_post_process_0", FixedQParamsObserver(1.0, 0, dtype=encoding.dtype))
    call = graph.call_module("activation_post_process_0", (graph.get_attr("weight"),))
    call.meta["val"] = root.weight
    graph.output(call)
    return GraphModule(root, graph)


@settings(max_examples=200, deadline=None)
@given(encodings())
def test_the_ops_of_conversion_find_the_given_integers(drawn):
    encoding, integers = drawn
    gm = observed_matrix(encoding)
    give_encoding(gm, "activation_post_process_0", encoding)
    call = next(node for node in gm.graph.nodes if node.op == "call_module")
    give_integers(gm, call, integers)
    x, tail = constant_of(gm, call), (encoding.quant_min, encoding.quant_max, encoding.dtype)
    if isinstance(encoding, PerTensorEncoding):
        found = qd.quantize_per_tensor(x, encoding.scale, encoding.zero_point, *tail)
    elif isinstance(encoding, PerGroupEncoding):
        found = qd.quantize_per_channel_group(x, encoding.scale, encoding.zero_point, *tail, 2)
    else:
        found = qd.quantize_per_channel(x, encoding.scale, encoding.zero_point, 0, *tail)
    assert torch.equal(found, integers)
    scale, zero_point = parameters_along(encoding, integers)
    assert scale.broadcast_to(3, 4).shape == zero_point.broadcast_to(3, 4).shape
