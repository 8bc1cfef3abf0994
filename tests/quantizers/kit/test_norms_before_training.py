"""Before training, batch norms that conversion folds are still in the graph: what is annotated around them."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant2e import capture
from quant2e.graph.captured.module import copy_graph
from quantizers import (
    ComposableQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    annotations_text,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)
from tests.quantizers.kit.test_rule_quantizer import Npu
from tests.quantizers.models import Of

IMAGE, SIGNAL, VOLUME, ROWS = (torch.randn(2, 3, *size) for size in ((8, 8), (8,), (4, 4, 4), ()))


def conv(**options):
    return nn.Conv2d(3, 3, 3, **{"padding": 1, **options})


def model(function, c=None, n=None, **parts):
    """A function of an image; ``m.c`` is a convolution and ``m.n`` its norm where nothing else is said."""
    return Of(function, c=conv() if c is None else c, n=nn.BatchNorm2d(3) if n is None else n, **parts)


MODELS = {
    "conv": lambda: model(lambda m, i: m.n(m.c(i))),
    "no bias": lambda: model(lambda m, i: m.n(m.c(i)), conv(bias=False)),
    "relu": lambda: model(lambda m, i: m.n(m.c(i)).relu()),
    "no bias, relu in place": lambda: model(lambda m, i: m.n(m.c(i)).relu_(), conv(bias=False)),
    "hardtanh": lambda: model(lambda m, i: F.hardtanh(m.n(m.c(i)))),
    "sigmoid": lambda: model(lambda m, i: m.n(m.c(i)).sigmoid()),
    "norm without scale": lambda: model(
        lambda m, i: m.n(m.c(i)).relu(), conv(bias=False), nn.BatchNorm2d(3, affine=False)
    ),
    "depthwise": lambda: model(lambda m, i: m.n(m.c(i)).relu(), conv(groups=3, bias=False)),
    "padded": lambda: model(lambda m, i: m.n(m.c(F.pad(i, (1, 1, 1, 1)))).relu(), conv(padding=0, bias=False)),
    "transposed": lambda: model(lambda m, i: m.n(m.c(i)).relu(), nn.ConvTranspose2d(3, 3, 3)),
    "conv1d": lambda: model(lambda m, i: m.n(m.c(i)).relu(), nn.Conv1d(3, 3, 3, bias=False), nn.BatchNorm1d(3)),
    "conv3d": lambda: model(lambda m, i: m.n(m.c(i)).relu(), nn.Conv3d(3, 3, 3, bias=False), nn.BatchNorm3d(3)),
    "linear": lambda: model(lambda m, i: m.n(m.c(i)).relu(), nn.Linear(3, 3), nn.BatchNorm1d(3)),
    "linear, no bias, add": lambda: model(
        lambda m, i: (m.n(m.c(i)) + i).relu(), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)
    ),
    "residual": lambda: model(lambda m, i: (m.n(m.c(i)) + i).relu(), conv(bias=False)),
    "residual of two": lambda: model(
        lambda m, i: m.o(m.d(i)) + m.n(m.c(i)), conv(bias=False), d=conv(), o=nn.BatchNorm2d(3)
    ),
    "cat": lambda: model(lambda m, i: torch.cat([m.n(m.c(i)).relu(), m.o(m.d(i))]), d=conv(), o=nn.BatchNorm2d(3)),
    "pool, conv": lambda: model(lambda m, i: m.d(F.max_pool2d(m.n(m.c(i)), 2)), d=conv()),
    "read twice": lambda: model(lambda m, i: (lambda y: y.relu() + y)(m.n(m.c(i)))),
    "called twice": lambda: model(lambda m, i: m.n(m.c(m.n(m.c(i)).relu()))),
    "one conv, two norms": lambda: model(lambda m, i: m.o(m.c(m.n(m.c(i)).relu())), o=nn.BatchNorm2d(3)),
    "two convs, one norm": lambda: model(lambda m, i: m.n(m.d(m.n(m.c(i)).relu())), d=conv(bias=False)),
    "not folded: alone": lambda: model(lambda m, i: m.c(m.n(i).relu())),
    "not folded: the conv is read twice": lambda: model(lambda m, i: (lambda y: m.n(y) + y)(m.c(i))),
    "not folded: no running statistics": lambda: model(
        lambda m, i: m.n(m.c(i)).relu(), n=nn.BatchNorm2d(3, track_running_stats=False)
    ),
    "not folded: behind a norm": lambda: model(lambda m, i: m.o(m.n(m.c(i))).relu(), o=nn.BatchNorm2d(3)),
}  # fmt: skip
INPUTS = {"conv1d": SIGNAL, "conv3d": VOLUME, "linear": ROWS, "linear, no bias, add": ROWS}


def xnnpack():
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=True))


def x86():
    config = get_default_x86_inductor_quantization_config(is_qat=True)
    return X86InductorQuantizer("avx512_vnni").set_global(config)


QUANTIZERS = {
    "xnnpack": xnnpack,
    "x86": x86,
    "int32 bias": Npu,
    "xnnpack but for a conv, then x86": lambda: ComposableQuantizer([xnnpack().set_module_name("c", None), x86()]),
}


@cache
def trained(name):
    return capture(MODELS[name]().train(), (INPUTS.get(name, IMAGE),))


def training_graph(name):
    """The graph as prepare_qat_pt2e gives it to a quantizer."""
    return copy_graph(trained(name))


def node(gm, name):
    return next(node for node in gm.graph.nodes if node.name == name)


def annotate(gm, quantizer):
    quantizer.transform_for_annotation(gm)
    quantizer.annotate(gm)
    return gm


@pytest.mark.parametrize("name", QUANTIZERS)
def test_annotations(name, golden):
    texts = [f"# {m}\n{annotations_text(annotate(training_graph(m), QUANTIZERS[name]()))}\n" for m in MODELS]
    golden(f"plans/training/{name.replace(' ', '_').replace(',', '')}", "\n".join(texts))


def test_the_graph_is_never_changed_while_a_quantizer_looks():
    seen = set()

    def look(node):
        node.graph.lint()
        seen.add(str(node.graph))
        return node.name == "add"

    gm = training_graph("residual of two")
    before = str(gm.graph)
    annotate(gm, xnnpack().set_node(look, None))
    assert seen == {before}
    assert str(gm.graph) == before


def test_settings_for_the_edge_behind_a_norm_apply():
    gm = annotate(training_graph("residual"), quantizer := xnnpack().set_edge("batch_norm", "add", None))
    assert "add" not in annotations_text(gm)
    assert quantizer.reason(node(gm, "add")) == "rule 'add': edge (batch_norm -> add) is set to float"


@pytest.mark.parametrize(
    ("name", "quantizer", "of", "reason"),
    [
        ("relu", xnnpack, "batch_norm", "quantized by conv"),
        ("conv3d", xnnpack, "batch_norm", "folded into 'conv3d', which stays float"),
        ("conv3d", xnnpack, "conv3d", "XNNPACK convolves in one and two dimensions only"),
        ("not folded: alone", xnnpack, "batch_norm", "XNNPACK computes it in float"),
        ("read twice", Npu, "relu", "rule 'mac': the output of 'batch_norm' is used 2 times (relu, add)"),
        (
            "sigmoid",
            x86,
            "sigmoid",
            (
                "computed in float on what the int8 kernel of 'conv2d' returns, without being quantized between: "
                "that kernel takes in relu, relu6, hardtanh, hardswish and silu, not sigmoid"
            ),
        ),
        ("relu", lambda: xnnpack().set_module_name("c", None), "conv2d", "set to float by module name 'c'"),
        ("relu", lambda: xnnpack().set_module_name("c", None), "batch_norm", "folded into 'conv2d', which stays float"),
        # The convolution decides, as it does where the norm is folded already.
        ("relu", lambda: xnnpack().set_module_name("n", None), "batch_norm", "quantized by conv"),
    ],
)
def test_reasons(name, quantizer, of, reason):
    quantizer = quantizer()
    gm = annotate(training_graph(name), quantizer)
    assert quantizer.reason(node(gm, of)) == reason


def test_explanations_name_the_end_of_the_chain():
    quantizer = xnnpack()
    gm = annotate(training_graph("conv"), quantizer)
    told = {name: quantizer.explain(node(gm, name)).splitlines()[1:] for name in ("conv2d", "batch_norm")}
    assert told == {
        "conv2d": [
            "  applied: rule 'conv' to conv2d, which ends in 'batch_norm'",
            "  nearly matched: rule 'pad + conv': 'inputs_0' is placeholder, not constant_pad_nd or pad",
        ],
        "batch_norm": ["  applied: rule 'conv' to conv2d, which ends here"],
    }
