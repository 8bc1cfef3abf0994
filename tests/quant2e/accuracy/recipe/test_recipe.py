"""Recipes as files: what is read, what is refused and where, imports, the schema, the difference."""

import json

import pytest

from quant2e import AnnotationError, FileFormatError, Quant2eError, Recipe
from quant2e.accuracy.recipe.recipe import recipe_of
from quant2e.accuracy.recipe.settings import OperandSettings, OpSettings, RecipeRule, TensorRule, Wanted

FULL = """
recipe: 1
description: every kind of rule
default: {use: w8a8}
rules:
  - {op: linear, use: w4a8-dynamic-g32}
  - module: blocks.*.up
    weight: {bits: 4, granularity: group, group_size: 32, symmetric: true, eps: 1e-7}
    activation: {dtype: int8, symmetric: false, method: percentile, percentile: 99.9}
  - {regex: 'blocks\\.[12]\\..*', mode: dynamic, activation: {granularity: token}}
  - {type: LayerNorm, name: 'layer*', use: float}
tensors:
  - {tensor: relu, scale: 0.1, zero_point: -3}
  - {tensor: w -> linear, scale: [0.1, 0.2], numbers: {granularity: channel}}
  - {tensor: add, use: float}
"""


def written(tmp_path, text, name="r.yaml"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


@pytest.mark.parametrize("name", ["again.yaml", "again.json"])
def test_files_hold_all_of_it(tmp_path, name):
    made = Recipe.from_file(written(tmp_path, FULL))
    assert made.rules[1].weight == OperandSettings(bits=4, granularity="group", group_size=32, symmetric=True, eps=1e-7)
    assert made.tensors[1].scales == (0.1, 0.2)
    made.to_file(tmp_path / name)
    assert Recipe.from_file(tmp_path / name) == made
    assert Recipe.from_dict(json.loads(json.dumps(made.as_dict()))) == made


WRONG = [
    (
        "recipe: 1\nrules:\n  - {op: linear, wight: float}\n",
        r"r.yaml:3: rules\[0\].wight: there is no 'wight'.*'weight'",
    ),
    (
        "recipe: 1\nrules:\n  - op: linear\n    weight: {bits: four}\n",
        r"r.yaml:4: rules\[0\].weight.bits: is 'four', and",
    ),
    ("recipe: 1\nrules:\n  - op: linear\n    weight: {bits: 9}\n", r"r.yaml:4: rules\[0\].weight: 9 bits"),
    ("recipe: 1\nrecipe: 1\n", r"r.yaml:2: the key 'recipe' stands twice"),
    ("recipe: 1\nrules:\n  - {op: linear, activation: {eps: .nan}}\n", r"r.yaml:3: .nan is no number"),
    ("recipe: 1\nrules:\n  - {op: linear, activation: {eps: .inf}}\n", r"r.yaml:3: .inf is no number"),
    ("recipe: 1\nrules: &a []\ntensors: *a\n", r"r.yaml:2: anchors and aliases are not read"),
    (
        "recipe: 1\nrules: !!python/object/apply:os.system ['true']\n",
        r"is not YAML of plain data: the tag .*os.system in line 2",
    ),
    ("recipe: 1\ndefault: {use: w8b8}\n", r"r.yaml:2: default: 'w8b8' is not a recipe"),
    ("recipe: 1\nrules: [{use: w8}]\n", r"r.yaml:2: rules\[0\]: a rule names ops by at least one of name, module"),
    ("recipe: 1\nrules: [{op: linear}]\n", r"a rule says something"),
    ("recipe: 1\nrules: [{op: linear, use: float, mode: dynamic}]\n", r"leaves the whole op float"),
    ("recipe: 1\nrules: [{regex: '(', use: float}]\n", r"'\(' is not a regular expression"),
    ("recipe: 1\nrules: [{op: linear, mode: statc}]\n", r"rules\[0\].mode: is 'statc', and must be one of .*'static'"),
    ("recipe: 1\nrules: {op: linear}\n", r"rules: is a mapping, and must be a list"),
    ("recipe: 1\ntensors: [{tensor: x, scale: -1}]\n", r"tensors\[0\]: a scale is a positive, finite number"),
    ("recipe: 1\ntensors: [{tensor: x, scale: 1.0e-300}]\n", r"the scale 1e-300 is no normal float32 number"),
    ("recipe: 1\ntensors: [{tensor: x, scale: [1, 2], zero_point: [1, 2, 3]}]\n", r"2 scales and 3 zero points"),
    ("recipe: 1\ntensors: [{tensor: x}]\n", r"it says something of its tensor"),
    (
        "recipe: 1\ntensors:\n  - {tensor: x, scale: 1}\n  - {tensor: x, scale: 2}\n",
        r"r.yaml:4: tensors\[1\]: is about 'x', and so is tensors\[0\]",
    ),
    ("rules: []\n", r"r.yaml:1: has no 'recipe', which says its format"),
    ("recipe: 2\n", r"format 2; this version reads format 1"),
    ("[]", r"is a list, and must be a mapping"),
    ("recipe: [1\n", "is not YAML"),
    ("", "must be a mapping"),
    ("recipe: 1\nalgorithms: [equalise]\n", "there is no algorithm 'equalise'"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_is_told_with_its_place(tmp_path, text, message):
    with pytest.raises((FileFormatError, Quant2eError), match=message):
        Recipe.from_file(written(tmp_path, text))


def test_json_is_as_strict(tmp_path):
    with pytest.raises(FileFormatError, match="stands twice"):
        Recipe.from_file(written(tmp_path, '{"recipe": 1, "recipe": 1}', "r.json"))
    with pytest.raises(FileFormatError, match="NaN"):
        Recipe.from_file(written(tmp_path, '{"recipe": 1, "rules": [NaN]}', "r.json"))
    with pytest.raises(FileFormatError, match=r"r.json: rules\[0\].wight"):
        Recipe.from_file(written(tmp_path, '{"recipe": 1, "rules": [{"op": "linear", "wight": "float"}]}', "r.json"))


def test_imports_come_first_and_later_ones_win(tmp_path):
    (tmp_path / "base").mkdir()
    written(tmp_path, "recipe: 1\ndefault: {use: w8}\nrules: [{op: a, use: w8}]\ndescription: base\n", "base/b.yaml")
    written(tmp_path, "recipe: 1\nimports: [b.yaml]\nrules: [{op: b, use: w8}]\n", "base/c.yaml")
    made = Recipe.from_file(
        written(tmp_path, "recipe: 1\nimports: [base/c.yaml]\ndefault: {use: w8a8}\nrules: [{op: c, use: w8}]\n")
    )
    assert [rule.op for rule in made.rules] == ["a", "b", "c"]
    assert made.default == OpSettings(use="w8a8")
    assert made.description == "base"
    assert made.imports == ()


def test_imports_that_are_refused(tmp_path):
    written(tmp_path, "recipe: 1\nimports: [b.yaml]\n", "a.yaml")
    written(tmp_path, "recipe: 1\nimports: [a.yaml]\n", "b.yaml")
    with pytest.raises(FileFormatError, match=r"in a circle: .*a.yaml imports .*b.yaml imports .*a.yaml"):
        Recipe.from_file(tmp_path / "a.yaml")
    with pytest.raises(FileFormatError, match=r"r.yaml:2: imports\[0\]: there is no file .*none.yaml"):
        Recipe.from_file(written(tmp_path, "recipe: 1\nimports: [none.yaml]\n"))
    with pytest.raises(FileFormatError, match="must be a path relative to this file"):
        Recipe.from_file(written(tmp_path, "recipe: 1\nimports: [/etc/passwd]\n"))
    with pytest.raises(Quant2eError, match="read it with Recipe.from_file"):
        Recipe.from_dict({"recipe": 1, "imports": ["a.yaml"]}).apply(object())


def test_what_a_recipe_is_given_as(tmp_path):
    assert recipe_of("w8a8-dynamic") == Recipe.named("w8a8-dynamic") == Recipe(default=OpSettings(use="w8a8-dynamic"))
    assert recipe_of(written(tmp_path, FULL)) == recipe_of(str(tmp_path / "r.yaml"))
    with pytest.raises(AnnotationError, match="is not a recipe"):
        recipe_of("w8q8")
    with pytest.raises(Quant2eError, match="recipe is a int"):
        recipe_of(3)


def test_later_rules_win_in_what_they_say():
    wanted = Wanted().then(OpSettings(use="w4-g32"), 0).then(OpSettings(weight=OperandSettings(symmetric=False)), 1)
    assert wanted.weight == OperandSettings(bits=4, granularity="group", group_size=32, symmetric=False)
    assert (wanted.mode, wanted.activation, wanted.by) == ("weight-only", "float", (0, 1))
    channel = wanted.then(OpSettings(weight=OperandSettings(granularity="channel")), 2)
    assert channel.weight == OperandSettings(bits=4, granularity="channel", symmetric=False)
    assert wanted.then(OpSettings(use="float"), 3).is_float
    assert wanted.then(OpSettings(use="float"), 3).then(OpSettings(weight=OperandSettings(bits=4)), 4).is_float
    assert not wanted.then(OpSettings(use="float"), 3).then(OpSettings(use="w8a8"), 4).is_float


def test_the_schema_describes_what_is_read():
    schema = Recipe.schema()
    rule = schema["properties"]["rules"]["items"]
    assert rule["additionalProperties"] is False
    assert rule["properties"]["mode"] == {"enum": ["static", "dynamic", "weight-only"]}
    json.dumps(schema)
    import jsonschema as checker

    checker.Draft202012Validator.check_schema(schema)
    checker.validate(Recipe(rules=(RecipeRule(op="linear", use="w8"),)).as_dict(), schema)


UP = (
    "weight.bits 4 -> 8; weight.symmetric true -> (nothing); weight.granularity group -> channel; "
    "weight.group_size 32 -> (nothing); weight.eps 1e-07 -> (nothing); "
    "activation {dtype: int8, symmetric: false, method: percentile, percentile: 99.9} -> (nothing)"
)


def test_a_difference_reads_like_a_review(tmp_path):
    old = Recipe.from_file(written(tmp_path, FULL))
    new = Recipe(
        default=OpSettings(use="w8a8-dynamic"),
        rules=(
            RecipeRule(op="conv2d", use="float"),
            *old.rules[:1],
            RecipeRule(module="blocks.*.up", weight=OperandSettings(bits=8, granularity="channel")),
        ),
        tensors=(TensorRule(tensor="relu", scale=0.2, zero_point=-3), *old.tensors[1:]),
    )
    assert old.diff(new).splitlines() == [
        "recipe: 4 -> 3 rules",
        "removed (2):",
        "  regex 'blocks\\.[12]\\..*': mode dynamic, activation {granularity: token}",
        "  name 'layer*' and type 'LayerNorm': use float",
        "added (1):",
        "  op 'conv2d': use float",
        "changed (4):",
        f"  module 'blocks.*.up': {UP}",
        "  tensor 'relu': scale 0.1 -> 0.2 (×2)",
        "  the recipe: default.use w8a8 -> w8a8-dynamic",
        "  the recipe: description every kind of rule -> (nothing)",
    ]
