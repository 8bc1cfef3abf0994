"""Which setting applies to which op, and settings that apply to none."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant2e import AnnotationError
from quant2e.graph.module_paths import plain_path
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config
from quantizers.settings.module_names import targets_of, type_name
from tests.quantizers.models import IMAGE, ROWS, Of, Residual, annotated, reasons

aten = torch.ops.aten
FULL = get_symmetric_quantization_config(is_per_channel=True)
LOW = get_symmetric_quantization_config(is_per_channel=True, act_qmin=0)
DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
NAMES = {FULL: "full", LOW: "low"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return F.linear(self.head(x), self.head.weight)


def chosen(configure, model=None, example=ROWS) -> dict[str, str]:
    """Which configuration the linears of the model get: up0 down0 up1 down1 head functional."""
    gm = annotated(model or Stack(), example, configure(XNNPACKQuantizer()))
    labels = ["up0", "down0", "up1", "down1", "head", "functional"]
    linears = [n for n in gm.graph.nodes if n.target is aten.linear.default]
    found = {}
    for label, node in zip(labels, linears, strict=True):
        note = node.meta.get("quantization_annotation")
        spec = None if note is None else note.input_qspec_map[node.args[0]]
        named = next((name for config, name in NAMES.items() if config.input_activation == spec), "float")
        if spec is not None and spec.is_dynamic:  # with a scale for each token, which no configuration spells
            named = "dynamic"
        found[label] = named
    return found


def everything(name, **others):
    return {**dict.fromkeys(["up0", "down0", "up1", "down1", "head", "functional"], name), **others}


@pytest.mark.parametrize(
    ("configure", "expected"),
    [
        (lambda q: q.set_global(FULL), everything("full")),
        (lambda q: q.set_global(FULL).set_global(None).set_global(LOW), everything("low")),
        (lambda q: q.set_module_name("head", FULL), everything("float", head="full")),
        (lambda q: q.set_module_name("blocks.0", LOW).set_global(FULL), everything("full", up0="low", down0="low")),
        # the innermost module wins, whatever the order
        (
            lambda q: q.set_module_name("blocks.0.up", None).set_module_name("blocks.0", LOW).set_global(FULL),
            everything("full", up0="float", down0="low"),
        ),
        (
            lambda q: q.set_module_name("blocks", LOW).set_module_name("blocks.1", None),
            everything("low", up1="float", down1="float", head="float", functional="float"),
        ),
        (
            lambda q: q.set_module_type(Block, LOW).set_module_type(nn.Linear, FULL),
            everything("full", functional="float"),
        ),
        (lambda q: q.set_module_type("Block", LOW), everything("low", head="float", functional="float")),
        (lambda q: q.set_module_type("torch.nn.Linear", LOW), everything("low", functional="float")),
        (lambda q: q.set_module_type("torch.nn.modules.linear.Linear", LOW), everything("low", functional="float")),
        # module name > module type > operator > global
        (
            lambda q: q.set_module_name("head", None).set_module_type(nn.Linear, LOW).set_operator_type(aten.linear,
                FULL),
            everything("low", head="float", functional="full"),
        ),
        (lambda q: q.set_operator_type(aten.linear.default, None).set_global(FULL), everything("float")),
        (lambda q: q.set_object_type(F.linear, LOW).set_global(FULL), everything("low")),
        (lambda q: q.set_object_type(nn.Linear, LOW).set_global(FULL), everything("low", functional="full")),
        # static and dynamic in one graph
        (lambda q: q.set_module_name("head", DYNAMIC).set_global(FULL), everything("full", head="dynamic")),
        (lambda q: q.set_global(FULL).set_filter_function(lambda n: n.name != "linear_1"),
            everything("full", down0="float")),
    ],
)  # fmt: skip
def test_precedence(configure, expected):
    assert chosen(configure) == expected


def test_a_fused_op_takes_the_configuration_of_the_op_that_computes():
    q = XNNPACKQuantizer().set_module_name("blocks.0.up", FULL)
    gm = annotated(Stack(), ROWS, q)
    named = {n.name: n for n in gm.graph.nodes}
    assert q.reason(named["relu"]) == "quantized by linear"
    assert q.reason(named["linear_1"]) == "no configuration covers it"


def test_the_op_with_the_weight_decides_and_not_the_padding_before_it():
    model = Of(lambda m, x: m.conv(F.pad(x, (0, 1, 0, 1))), conv=nn.Conv2d(3, 4, 3))
    q = XNNPACKQuantizer().set_global(FULL).set_module_type(nn.Conv2d, LOW)
    gm = annotated(model, IMAGE, q)
    (pad,) = (n for n in gm.graph.nodes if n.name == "pad")
    assert pad.meta["quantization_annotation"].input_qspec_map[pad.args[0]] == LOW.input_activation


def test_unless_it_is_set_to_float():
    q = XNNPACKQuantizer().set_global(FULL).set_operator_type(torch.relu, None)
    gm = annotated(Stack(), ROWS, q)
    assert reasons(gm, q) == dict.fromkeys(("relu", "relu_1"), "set to float by operator 'relu'")
    named = {n.name: n for n in gm.graph.nodes}
    assert named["linear"].meta["quantization_annotation"].output_qspec == FULL.output_activation


def test_reasons_name_the_setting():
    q = (
        XNNPACKQuantizer()
        .set_global(FULL)
        .set_module_name("head", None)
        .set_filter_function(lambda n: n.name != "linear")
    )
    why = reasons(annotated(Stack(), ROWS, q), q)
    assert why["linear_4"] == "set to float by module name 'head'"
    assert why["linear"] == "set to float by the filter function, which answers False"


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (lambda q: q.set_module_name("block.0.up", None),
            r"no module named 'block.0.up' .*; did you mean 'blocks.0.up'"),
        (lambda q: q.set_module_name("encoder.head", FULL), "did you mean 'head'"),
        (lambda q: q.set_module_type("Linaer", FULL),
            "no module of type 'Linaer' .* did you mean 'torch.nn.modules.linear.Linear'"),
        (lambda q: q.set_module_type(nn.Conv2d, FULL), "no module of type 'torch.nn.modules.conv.Conv2d'"),
        (lambda q: q.set_operator_type(aten.conv2d.default, FULL),
            "no op in this graph is conv2d.default; there is 'linear', 'relu'"),
        (lambda q: q.set_operator_type("linear", FULL), "is not an op"),
        (lambda q: q.set_object_type(torch.manual_seed, FULL), "is not an op"),
        (lambda q: q.set_module_type(F.linear, FULL), "is not a module type"),
        (lambda q: q.set_module_name("hed", None).set_module_name("hea", None),
            "'hed' .*; no module named 'hea'|'hea' .*; no module named 'hed'"),
    ],
)  # fmt: skip
def test_settings_that_match_nothing(configure, message):
    with pytest.raises(AnnotationError, match=message):
        annotated(Stack(), ROWS, configure(XNNPACKQuantizer().set_global(FULL)))


def test_a_batch_norm_that_was_folded_is_no_mistake():
    q = XNNPACKQuantizer().set_global(FULL).set_module_type(nn.BatchNorm2d, None)
    annotated(Residual(), IMAGE, q)
    assert q.notes == [
        (
            "no module of type 'torch.nn.modules.batchnorm.BatchNorm2d' computes anything in this graph: "
            "batch norms are folded into convolutions"
        ),
    ]


def test_a_module_that_is_called_twice_is_one_module():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(self.block(x))

    q = XNNPACKQuantizer().set_global(FULL).set_module_name("block.up", None)
    why = reasons(annotated(Twice(), ROWS, q), q)
    assert {why["linear"], why["linear_2"]} == {"set to float by module name 'block.up'"}


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("L['self'].blocks[0].up", "blocks.0.up"),
        ("L['self'].blocks.0.up", "blocks.0.up"),
        ("L['self']._modules['blocks']._modules['0']", "blocks.0"),
        ("getattr(L['self'].layers, '0').q", "layers.0.q"),
        ("getattr(getattr(L['self'].layers, '0').mlp, '2')", "layers.0.mlp.2"),
        ("blocks.0.up@1", "blocks.0.up"),
        ("L['self']", ""),
        ("", ""),
    ],
)
def test_paths_of_all_tracers(path, plain):
    assert plain_path(path) == plain


def test_names_of_types_and_functions():
    assert type_name(nn.Linear) == type_name("torch.nn.Linear") == "torch.nn.modules.linear.Linear"
    assert type_name("mine.Special") == "mine.Special"
    for function, target in [
        (F.linear, aten.linear.default),
        (F.max_pool2d, aten.max_pool2d.default),
        (operator.add, aten.add.Tensor),
        (operator.iadd, aten.add_.Tensor),
        (torch.cat, aten.cat.default),
        (torch.Tensor.add_, aten.add_.Tensor),
        (aten.relu, aten.relu_.default),
    ]:
        assert target in targets_of(function)
