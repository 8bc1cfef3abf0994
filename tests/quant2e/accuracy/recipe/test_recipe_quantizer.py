"""One recipe drives every quantizer; what a backend cannot honour is told, and nothing else changes."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import quant2e
from quant2e import AnnotationError, Quant2eError, Recipe
from quantizers import ComposableQuantizer, EmbeddingQuantizer, Int16Quantizer, X86InductorQuantizer, XNNPACKQuantizer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.relu(self.up(y)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


DATA = [(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)),) for seed in range(4)]

MIXED = {
    "recipe": 1,
    "default": {"use": "w8a8"},
    "rules": [
        {"module": "head", "use": "float"},
        {"module": "up", "mode": "dynamic", "weight": {"bits": 4}},
        {"op": "conv2d", "activation": {"method": "percentile", "percentile": 99.9}},
    ],
}


def quantized(net, quantizer, recipe, **options):
    options = {"min_sqnr_db": None, "allow_unquantized": True, **options}
    return quant2e.quantize(net, DATA[0], quantizer, DATA, recipe=recipe, **options)


def kinds(result):
    return {v.op.name: v.kind for v in result.report.verdicts}


@pytest.mark.parametrize(
    "make",
    [
        XNNPACKQuantizer,
        X86InductorQuantizer,
        lambda: ComposableQuantizer([EmbeddingQuantizer(), XNNPACKQuantizer()]),
    ],
)
def test_the_same_recipe_on_each_backend(net, make):
    made = quantized(net, make(), MIXED)
    found = kinds(made)
    assert (found["conv2d"], found["linear"], found["linear_1"]) == ("static", "dynamic", "float")
    assert made.report.of("linear_1").reason == "rules[0] of the recipe, module 'head', leaves it float"
    (weight,) = [g for g in made.encodings.groups if g.points == ("up_weight -> linear",)]
    assert weight.quant_max - weight.quant_min < 16
    assert not [note for note in made.report.notes if "predicate" in note]
    assert made.encodings.quantizer == type(make()).__name__


def test_a_name_is_the_backend_s_own_default(net):
    by_name = quantized(net, XNNPACKQuantizer(), "w8a8")
    by_setting = quant2e.quantize(net, DATA[0], XNNPACKQuantizer().set_global("w8a8"), DATA)
    assert by_name.encodings == by_setting.encodings
    assert torch.equal(by_name(*DATA[0]), by_setting(*DATA[0]))


def test_what_a_backend_does_not_run_is_told_before_anything_runs(net):
    captured = quant2e.capture(net, DATA[0])
    unmet = Recipe.from_dict(MIXED).unmet(captured, Int16Quantizer())
    assert any("'conv2d'" in line and "does not run 'w8a8'" in line for line in unmet)
    assert any("'linear'" in line and "find scales at run time" in line for line in unmet)
    notes = quantized(net, Int16Quantizer(), MIXED).report.notes
    assert {f"recipe: {line}" for line in unmet} <= set(notes)
    assert Recipe.from_dict(MIXED).unmet(captured, XNNPACKQuantizer()) == []


REFUSED = [
    ({"op": "conv2d", "activation": {"granularity": "channel"}}, "one scale per tensor, or per token at run time"),
    ({"op": "conv2d", "activation": {"granularity": "token"}}, "a scale per token is found at run time"),
    ({"op": "conv2d", "activation": {"dtype": "int16"}}, "XNNPACK computes on torch.int8 only"),
    ({"op": "mean", "weight": {"bits": 4}, "name": "mean"}, None),
    ({"op": "conv2d", "weight": {"granularity": "group", "group_size": 3}}, "groups"),
]


@pytest.mark.parametrize(("rule", "reason"), REFUSED)
def test_numbers_that_a_backend_cannot_have(net, rule, reason):
    quantizer = XNNPACKQuantizer().set_global("w8a8")
    plain = quant2e.quantize(net, DATA[0], quantizer, DATA)
    made = quantized(net, quantizer, {"recipe": 1, "rules": [rule]})
    told = [note for note in made.report.notes if note.startswith("recipe: rules[0]")]
    assert len(told) == (reason is not None), told
    if reason is not None:
        assert reason in told[0]
    assert made.encodings == plain.encodings


def test_numbers_alone_change_the_user_s_own_configuration(net):
    quantizer = XNNPACKQuantizer().set_module_name("up", "w8a8")
    rule = {"module": "up", "weight": {"quant_min": -64, "quant_max": 63, "granularity": "tensor"}}
    made = quantized(net, quantizer, {"recipe": 1, "rules": [rule]})
    (weight,) = [g for g in made.encodings.groups if g.points == ("up_weight -> linear",)]
    assert (weight.encoding, weight.quant_min, weight.quant_max) == ("per_tensor", -64, 63)
    assert kinds(made)["conv2d"] == "float"
    again = quant2e.quantize(net, DATA[0], quantizer, DATA)  # the quantizer itself is as it was
    assert next(g for g in again.encodings.groups if "up_weight" in g.points[0]).encoding == "per_channel"


def test_tensors_have_the_numbers_that_are_given(net):
    tensors = [{"tensor": "relu", "scale": 0.1, "zero_point": -128}, {"tensor": "linear_1", "use": "float"}]
    made = quantized(net, XNNPACKQuantizer(), {"recipe": 1, "default": {"use": "w8a8"}, "tensors": tensors})
    (relu,) = [g for g in made.encodings.groups if "relu" in g.points]
    assert relu.scale[0] == pytest.approx(0.1)
    assert relu.zero_point == (-128,)
    assert not [g for g in made.encodings.groups if "linear_1" in g.points]
    bad = [{"tensor": "relu", "scale": 0.1, "zero_point": 900}]
    told = quantized(net, XNNPACKQuantizer(), {"recipe": 1, "default": {"use": "w8a8"}, "tensors": bad})
    assert any(note.startswith("recipe: tensors[0]") for note in told.report.notes), told.report.notes


def test_rules_that_name_nothing(net):
    for rule, near in (
        (
            {"module": "heed", "use": "float"},
            "rules[0], module 'heed', names nothing in this model; did you mean 'head'",
        ),
        ({"op": "conv3d", "use": "float"}, "did you mean 'conv2d'"),
        ({"type": "Linears", "use": "float"}, "did you mean 'Linear'"),
        ({"name": "linear_9", "use": "float"}, "did you mean 'linear_1'"),
        ({"regex": "hea", "use": "float"}, "did you mean 'head'"),
    ):
        with pytest.raises(AnnotationError) as refused:
            quantized(net, XNNPACKQuantizer(), {"recipe": 1, "rules": [rule]})
        assert near in str(refused.value)
    with pytest.raises(AnnotationError, match="there is no tensor 'reluu'; did you mean 'relu'"):
        quantized(net, XNNPACKQuantizer(), {"recipe": 1, "tensors": [{"tensor": "reluu", "scale": 1.0}]})


def test_the_order_of_rules_decides(net):
    first, second = {"type": "Linear", "use": "float"}, {"module": "up", "use": "w8a8"}
    for rules, kind in (((first, second), "static"), ((second, first), "float")):
        recipe = {"recipe": 1, "default": {"use": "w8a8"}, "rules": list(rules)}
        assert kinds(quantized(net, XNNPACKQuantizer(), recipe))["linear"] == kind


def test_algorithms_are_those_of_the_recipe(net):
    recipe = {"recipe": 1, "default": {"use": "w8a8"}, "algorithms": ["equalize"]}
    made = quantized(net, XNNPACKQuantizer(), recipe)
    assert [step.name for step in made.report.algorithms] == ["equalize"]
    with pytest.raises(Quant2eError, match="both the recipe and algorithms="):
        quantized(net, XNNPACKQuantizer(), recipe, algorithms=["equalize"])


GUEST = """
import sys, torch
sys.path.insert(0, {root!r})
import quant2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x
from tests.quant2e.accuracy.recipe.test_recipe_quantizer import Net, quantized, kinds
torch.manual_seed(0)
recipe = {{
    "recipe": 1,
    "rules": [
        {{"module": "head", "use": "float"}},
        {{"module": "up", "mode": "dynamic", "weight": {{"granularity": "group", "group_size": 4, "bits": 4}}}},
        {{"op": "conv2d", "weight": {{"bits": 4, "granularity": "tensor"}}, "activation": {{"bits": 6}}}},
        {{"op": "mean", "activation": {{"bits": 4}}}},
    ],
}}
guest = x.X86InductorQuantizer().set_global(x.get_default_x86_inductor_quantization_config())
made = quantized(Net().eval(), guest, recipe)
found = kinds(made)
assert (found["conv2d"], found["linear"], found["linear_1"]) == ("static", "dynamic", "float"), found
groups = {{g.points[0]: g for g in made.encodings.groups}}
assert groups["x -> conv2d"].quant_max == 63
assert (groups["conv_weight -> conv2d"].encoding, groups["conv_weight -> conv2d"].quant_max) == ("per_tensor", 7)
assert (groups["up_weight -> linear"].encoding, groups["up_weight -> linear"].group_size) == ("per_group", 4)
assert groups["mean -> linear"].encoding == "dynamic"
assert any("X86InductorQuantizer does not quantize: 'mean'" in note for note in made.report.notes), made.report.notes
"""


@pytest.mark.slow
def test_a_guest_without_settings_of_ours(tmp_path):
    if find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    code = GUEST.format(root=str(Path(__file__).parents[4]))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return torch.cond(x.sum() > 0, self.second, lambda y: self.third(y) - 1.0, (self.first(x),))


@pytest.mark.slow
def test_ops_in_bodies():
    batches = [(torch.randn(4, 8) + offset,) for offset in (1.0, -1.0, 1.0, -1.0)]
    recipe = {"recipe": 1, "default": {"use": "w8a8"}, "rules": [{"module": "second", "use": "float"}]}
    made = quant2e.quantize(Branches().eval(), batches[0], XNNPACKQuantizer(), batches, recipe=recipe, min_sqnr_db=None)
    found = kinds(made)
    assert found["linear"] == "static"
    assert found["true_graph_0.linear_1"] == "float"
    assert found["false_graph_0.linear_1"] == "static"


def test_a_recipe_of_which_nothing_can_be_done(net):
    with pytest.raises(Quant2eError, match=r"float ops. It cannot do what the recipe asks: .* does not run 'w8a8'"):
        quantized(net, Int16Quantizer(), "w8a8", allow_unquantized=False)
