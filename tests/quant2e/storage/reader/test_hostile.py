"""Hostile files: each is refused, and nothing of it has run. All of them carry hashes that fit."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quant2e.errors import FileFormatError
from quant2e.pipeline import quantize
from quant2e.quantized_model import load
from quant2e.storage.manifest import check_manifest
from quant2e.storage.reader.archive import records_of
from quant2e.storage.reader.ops import Ops
from tests.quant2e.annotators import DYNAMIC, products
from tests.quant2e.storage.archives import MODEL, records_in, rewritten, zipped

MARK = "QUANT2E_TEST_WAS_HERE"
CODE = f"__import__('os').environ.__setitem__({MARK!r}, '1')"


class Branches(nn.Module):
    """A branch, a constant text, nested and keyword inputs, a buffer and a parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, mode="fast", *, extra):
        self.calls.add_(1)
        y = self.first(x) + extra["bias"][0]
        z = torch.cond(y.sum() > 0, lambda y: y * 2.0, lambda y: y - 1.0, (y,))
        return {"y": self.second(z), "pair": (z, x)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    shapes = {"x": {0: torch.export.Dim("n", min=2, max=64)}, "mode": None, "extra": {"bias": [None]}}
    example = ((torch.randn(3, 8), "fast"), {"extra": {"bias": [torch.randn(8)]}})
    model = quantize(
        Branches().eval(), example[0], products(act=DYNAMIC, output=None), kwargs=example[1], dynamic_shapes=shapes
    )
    path = tmp_path_factory.mktemp("hostile") / "model.pt2"
    model.save(path)
    load(path)
    return path


@pytest.fixture(autouse=True)
def nothing_ran():
    yield
    assert MARK not in os.environ


def refused(path, message="cannot be read|is not a|does not"):
    with pytest.raises(FileFormatError, match=message):
        load(path)
    assert MARK not in os.environ


def top(program):
    return program["graph_module"]["graph"]


def every(data, key):
    """Every object that has ``key``, at any depth."""
    if isinstance(data, dict):
        if key in data:
            yield data
        for value in data.values():
            yield from every(value, key)
    elif isinstance(data, list):
        for value in data:
            yield from every(value, key)


def renamed(program, old, new):
    """Every text that is ``old``, as a key or a value, becomes ``new``: names stay consistent."""
    text = json.dumps(program)
    found = json.loads(text.replace(json.dumps(old), json.dumps(new)))
    program.clear()
    program.update(found)


# -------------------------------------------------------------------------------------------------------- code as names


def _rename(old):
    return lambda program, code: renamed(program, old, code)


def _rename_inputs_of_branches(program, code):
    for held in every(program, "as_graph"):
        graph = held["as_graph"]["graph"]
        renamed(graph, graph["inputs"][0]["as_tensor"]["name"], code)


def _rename_branches(program, code):
    for held in every(program, "as_graph"):
        held["as_graph"]["name"] = code


def _rename_arguments(program, code):
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"][0] = code


def _rename_keywords(program, code):
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = None
    spec = json.loads(signature["in_spec"])
    spec[1]["children_spec"][1]["context"] = json.dumps([code])
    signature["in_spec"] = json.dumps(spec)


def _rename_operand(program, code):
    for node in top(program)["nodes"]:
        if "cond" in node["target"]:
            node["inputs"][0] |= {"name": code, "kind": 2}


def _guard(program, code):
    program["guards_code"] = [code]


def _rename_result(program, code):
    node = next(node for node in top(program)["nodes"] if "linear" in node["target"])
    renamed(program, node["outputs"][0]["as_tensor"]["name"], code)


ROUTES = {
    "a guard": _guard,
    "the name of an input": _rename("x"),
    "the name of an input of a branch": _rename_inputs_of_branches,
    "the name of a branch": _rename_branches,
    "the name of an argument": _rename_arguments,
    "the name of a keyword": _rename_keywords,
    "the keyword of an operand": _rename_operand,
    "the name of a node": _rename_result,
    "the name of a parameter": _rename("second.bias"),
    "the name of a buffer": _rename("calls"),
    "the name of a constant": _rename("mode"),
}
NAMES = [
    CODE,
    f"x={CODE}",
    f"x, y={CODE}",
    f'a"), {CODE}, getattr(self, "a',
    f"calls); {CODE}; (0",
    f"x\n    {CODE}\n    y",
    f"x.size()[0] == 3, {CODE} or 'a'",
    f"L['x'].size()[0] == 3 or {CODE}",
    f"L['mode'] == 'fast' or {CODE} or ''",
    "__class__",
    "lambda",
    "x.__class__",
    "\N{MATHEMATICAL BOLD SMALL X}",
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("code", NAMES, ids=range(len(NAMES)))
def test_code_in_place_of_a_name(saved, tmp_path, route, code):
    path = rewritten(saved, tmp_path / "evil.pt2", lambda program: ROUTES[route](program, code))
    refused(path)


NAMES_OF_THE_MODULE = ["forward", "graph", "code", "train", "parameters", "_parameters", "inputs", "state_dict"]


@pytest.mark.parametrize("name", NAMES_OF_THE_MODULE)
@pytest.mark.parametrize("route", ["the name of a branch", "the name of a parameter", "the name of a buffer"])
def test_attributes_that_the_module_has(saved, tmp_path, route, name):
    refused(rewritten(saved, tmp_path / "evil.pt2", lambda program: ROUTES[route](program, name)))


def test_an_argument_that_is_the_module(saved, tmp_path):
    refused(rewritten(saved, tmp_path / "evil.pt2", lambda program: _rename_arguments(program, "self")), "plain names")


def test_a_constant_text_is_compared_and_nothing_else(saved, tmp_path):
    text = f"fast' or {CODE} or '"

    def edit(program):
        renamed(program, "fast", text)
        program["guards_code"] = []

    path = rewritten(saved, tmp_path / "odd.pt2", edit)
    model = load(path)
    inputs = (torch.randn(3, 8), text)
    model(*inputs, extra={"bias": [torch.randn(8)]})
    with pytest.raises(ValueError, match="mode == "):
        model(torch.randn(3, 8), "fast", extra={"bias": [torch.randn(8)]})


def test_a_text_among_operands_is_only_text(saved, tmp_path):
    def edit(program):
        node = next(node for node in top(program)["nodes"] if "linear" in node["target"])
        node["metadata"] = {"stack_trace": f'File "a.py", line 1, in f\n    """\n{CODE}\n"""'}

    assert '"""' not in load(rewritten(saved, tmp_path / "odd.pt2", edit)).module.print_readable(print_output=False)


# -------------------------------------------------------------------------------------------------------------- targets

TARGETS = [
    "torch.serialization.os.system",
    "torch.os.system",
    "torch.ops.os.system",
    "torch.ops.aten.__class__.__init__",
    "torch.ops.aten.add.__class__",
    "torch.ops.aten.add.__init__",
    "torch.ops.load_library.__func__.__call__",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.save.default",
    "torch.ops.aten.set_.source_Storage",
    "torch.ops.aten.resize_.default",
    "torch.ops.aten.add.out",
    "torch.ops.aten._print.default",
    "torch.ops.prim.Print.default",
    "torch.ops.inductor.accumulate_grad_.default",
    "torch.ops.c10d.send.default",
    "torch.ops.profiler._record_function_enter.default",
    "torch.ops.quantized.conv2d_prepack.default",
    "torch.ops.higher_order.triton_kernel_wrapper_mutation",
    "torch.ops.higher_order.call_torchbind",
    "torch.ops.higher_order.print",
    "torch.hub.load",
    "_operator.attrgetter",
    "_operator.methodcaller",
    "_operator.getitem",
    "_operator.setitem",
    "math.__loader__.load_module",
    "#namespace:op",
    "os.system",
    "builtins.exec",
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("inside", [False, True], ids=["node", "node of a branch"])
def test_names_that_are_no_ops(saved, tmp_path, target, inside):
    def edit(program):
        graph = next(every(program, "as_graph"))["as_graph"]["graph"] if inside else top(program)
        graph["nodes"][0]["target"] = target

    refused(rewritten(saved, tmp_path / "evil.pt2", edit), "not an op that a quantized program uses")


def test_an_op_as_an_operand(saved, tmp_path):
    def edit(program):
        top(program)["nodes"][0]["inputs"][0]["arg"] = {"as_operator": "torch.os.system"}

    refused(rewritten(saved, tmp_path / "evil.pt2", edit), "not supported")


def test_an_op_of_a_library_that_is_not_imported(saved, tmp_path):
    def edit(program):
        top(program)["nodes"][0]["target"] = "torch.ops.mylib.nothing.default"

    refused(rewritten(saved, tmp_path / "evil.pt2", edit), "'mylib::nothing', which no library.*import the library")


# ---------------------------------------------------------------------------------------------------------- expressions

EXPRESSIONS = [
    CODE,
    "().__class__",
    "Symbol('x').__class__",
    "Symbol('__import__(1)')",
    "Symbol('__class__')",
    "[1 for _ in x]",
    "(lambda: 1)()",
    "exec('1')",
    "Lambda(x, 1)(2)",
    "9**9**9",
    "f'{x}'",
    "x.y",
    "(" * 500 + ")" * 500,
    "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
    "Pow(Pow(Pow(Integer(9), Integer(8)), Integer(8)), Integer(8))",
    "Integer(99999999999999999999)",
    "Mul(" * 100 + "Integer(1)" + ")" * 100,
    "Max(" + ", ".join(f"Symbol('s{i}', integer=True)" for i in range(2000)) + ")",
    "Symbol('s77', evil=True)",
    "FloorDiv(Integer(1), Integer(0))",
    "Function('f')(Integer(1))",
    "Integer(3) + 1",
    "",
]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=range(len(EXPRESSIONS)))
def test_expressions_with_code(saved, tmp_path, expression):
    def edit(program):
        for held in every(program, "expr_str"):
            held["expr_str"] = expression

    refused(rewritten(saved, tmp_path / "evil.pt2", edit), "not a plain shape formula")


# ----------------------------------------------------------------------------------------------------------- structures

STRUCTURES = [
    {"__enum__": True, "fqn": "os:environ", "name": "PATH"},
    {"default_factory_module": "os", "default_factory_name": "getcwd", "dict_context": []},
    {"default_factory_module": "builtins", "default_factory_name": "breakpoint", "dict_context": []},
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.get("fqn") or s["default_factory_name"])
@pytest.mark.parametrize("kind", ["tuple", "dict", "defaultdict", "namedtuple"])
@pytest.mark.parametrize("as_text", [False, True])
def test_structures_that_import(saved, tmp_path, structure, kind, as_text):
    context = json.dumps(structure).replace("_", "\\u005f") if as_text else structure
    module = "builtins" if kind in ("tuple", "dict") else "collections"
    spec = json.dumps([1, {"type": f"{module}.{kind}", "context": context, "children_spec": []}])

    def edit(program):
        program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = spec

    refused(rewritten(saved, tmp_path / "evil.pt2", edit), "structure of|not registered")


# ---------------------------------------------------------------------------------------------------- pickles and parts


class Payload:
    """Unpickled, it leaves a mark in the environment."""

    def __reduce__(self):
        return exec, (f"import os; os.environ[{MARK!r}] = '1'",)


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def config(path_name, use_pickle):
    entry = {"path_name": path_name, "is_param": False, "use_pickle": use_pickle, "tensor_meta": None}
    return json.dumps({"config": {"evil": entry}}).encode()


def shared(levels=40):
    value = (0,)
    for _ in range(levels):
        value = (value, value)
    return ((value,), {})


WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
INPUTS = "data/sample_inputs/model.pt"
PARTS = {
    "a pickled weight": (
        {WEIGHTS: config("weight_0", True), "data/weights/weight_0": pickled(Payload())},
        "pickled obj",
    ),
    "a pickled constant": ({CONSTANTS: config("tensor_0", True)}, "pickled objects"),
    "pickle without saying so": (
        {CONSTANTS: config("opaque_obj_0", False), "data/constants/opaque_obj_0": pickle.dumps(Payload())},
        "opaque_obj_0",
    ),
    "a script object": (
        {CONSTANTS: config("custom_obj_0", True), "data/constants/custom_obj_0": pickle.dumps(Payload())},
        "pickled objects",
    ),
    "weights of an older format": ({"data/weights/model.pt": pickled(Payload())}, "no part of a plain program"),
    "constants of an older format": ({"data/constants/model.pt": pickled(Payload())}, "no part of a plain program"),
    "example inputs": ({INPUTS: pickled(((Payload(),), {}))}, "example inputs that are not|example inputs are not"),
    "example inputs that are a class": ({INPUTS: pickled(((nn.Linear,), {}))}, "example inputs are not plain"),
    "example inputs without end": ({INPUTS: pickled(shared())}, "they are more than"),
    "example inputs of another form": ({INPUTS: pickled([1])}, "not positional and keyword inputs"),
    "example inputs that are none": ({INPUTS: b"no zip"}, "example inputs"),
    "compiled code": ({"data/aotinductor/model/a.so": b""}, "no part of a plain program"),
    "a record that nothing names": ({"data/weights/weight_99": b""}, "no part of a plain program"),
    "a path upwards": ({"../evil": b""}, "no name of a record"),
    "JSON that is none": ({MODEL: b"{"}, "not JSON"),
    "JSON without end": ({MODEL: b"[" * 100_000}, "nested too deeply"),
    "JSON with a key twice": ({MODEL: b'{"graph_module": 1, "graph_module": 2}'}, "stands twice"),
    "a second program": ({"models/other.json": b"{}"}, "holds 2 programs"),
    "no program": ({MODEL: None}, "holds 0 programs"),
    "another format": ({"archive_version": b"9"}, "archive_version"),
    "other bytes": ({"byteorder": b"big"}, "byteorder"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts(saved, tmp_path, name):
    parts, message = PARTS[name]
    refused(rewritten(saved, tmp_path / "evil.pt2", **parts), message)


# ----------------------------------------------------------------------------------------------------------- the zip


def test_the_file_is_opened_once(saved, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_bytes(saved.read_bytes())
    opened, really = [], os.open

    def replaced(name, *arguments, **options):
        """The file is another one as soon as it has been opened."""
        descriptor = really(name, *arguments, **options)
        if str(name) == str(path):
            opened.append(str(name))
            os.unlink(path)  # noqa: PTH108
            path.symlink_to(__file__)
        return descriptor

    expected = load(saved)
    monkeypatch.setattr(os, "open", replaced)
    found = load(path)
    assert opened == [str(path)]
    assert path.is_symlink()
    for ours, theirs in zip(found.module.state_dict().values(), expected.module.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def directory(data):
    """Where the entries of a directory begin."""
    places, position = [], struct.unpack_from("<I", data, len(data) - 6)[0]
    while data[position : position + 4] == b"PK\1\2":
        places.append(position)
        lengths = struct.unpack_from("<3H", data, position + 28)
        position += 46 + sum(lengths)
    return places


@pytest.fixture(scope="module")
def data(saved):
    return saved.read_bytes()


@pytest.mark.parametrize("field", [(8, 2), (10, 2), (32, 2), (34, 2), (36, 2), (38, 4)], ids=lambda f: f[0])
def test_flags_and_attributes_of_every_record(data, tmp_path, field):
    """Flags, method, comment, disk, internal and external attributes: every bit, in a few records each."""
    offset, width = field
    places = directory(data)
    for bit in range(8 * width):
        place = places[bit % len(places)] + offset + bit // 8
        broken = bytearray(data)
        broken[place] ^= 1 << (bit % 8)
        (tmp_path / "bad.pt2").write_bytes(broken)
        refused(tmp_path / "bad.pt2")


def test_the_bit_that_makes_a_folder_of_a_weight(data, tmp_path):
    for place in directory(data):
        broken = bytearray(data)
        broken[place + 38] ^= 0x10
        (tmp_path / "bad.pt2").write_bytes(broken)
        refused(tmp_path / "bad.pt2", "attributes")


def test_a_record_twice(saved, tmp_path):
    records = records_in(saved)
    one = zipped(records)
    evil = one.replace(b"archive/byteorder", b"archive/archive_f")
    (tmp_path / "evil.pt2").write_bytes(evil)
    refused(tmp_path / "evil.pt2")


def test_compressed_records(saved, tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.pt2", "w", zipfile.ZIP_DEFLATED) as archive_file:
        for name, content in records_in(saved).items():
            archive_file.writestr(f"archive/{name}", content)
    refused(tmp_path / "evil.pt2", "compressed")


@pytest.mark.parametrize("where", ["front", "behind", "comment"])
def test_more_bytes_than_the_records(data, tmp_path, where):
    changed = {"front": b"x" + data, "behind": data + b"x", "comment": data[:-2] + b"\1\0x"}
    (tmp_path / "evil.pt2").write_bytes(changed[where])
    refused(tmp_path / "evil.pt2")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_files_that_were_cut_off(data, tmp_path, keep):
    (tmp_path / "cut.pt2").write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refused(tmp_path / "cut.pt2")


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_random_bytes(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("random") / "random.pt2"
    for start in (b"", b"PK\5\6"):
        path.write_bytes(start + content)
        refused(path)
    path.write_bytes(content + b"PK\5\6" + bytes(18))
    refused(path)


def test_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.pt2"):
        refused(path, "does not exist, or is not a file")


# ------------------------------------------------------------------------------------------------------------ tensors


def test_one_flipped_bit_in_a_weight(data, tmp_path):
    broken = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        info = next(info for info in file.infolist() if info.filename.endswith("weights/weight_0"))
    length = sum(struct.unpack_from("<2H", data, info.header_offset + 26))
    place = info.header_offset + 30 + length
    broken[place] ^= 1
    (tmp_path / "bad.pt2").write_bytes(broken)
    refused(tmp_path / "bad.pt2", "does not match its checksum")
    entry = next(
        place for place in directory(data) if info.filename.encode() == data[place + 46 :][: len(info.filename)]
    )
    crc = struct.pack("<I", zlib.crc32(broken[place : place + info.file_size]))
    for at in (entry + 16, info.header_offset + 14):
        if data[at : at + 4] == struct.pack("<I", info.CRC):
            broken[at : at + 4] = crc
    end = place + info.file_size
    if data[end : end + 4] == b"PK\7\10":
        broken[end + 4 : end + 8] = crc
    (tmp_path / "bad.pt2").write_bytes(broken)
    if any(name.endswith("manifest.json") for name in records_in(tmp_path / "bad.pt2")):
        refused(tmp_path / "bad.pt2", "damaged or edited")


def _meta(**changes):
    def edit(records):
        weights = json.loads(records[WEIGHTS])
        entry = next(entry for entry in weights["config"].values() if len(entry["tensor_meta"]["sizes"]) == 2)
        entry["tensor_meta"] |= changes
        return {WEIGHTS: json.dumps(weights).encode()}

    return edit


def sizes(*numbers):
    return [{"as_int": number} for number in numbers]


TENSORS = {
    "larger than its record": _meta(sizes=sizes(800, 800), strides=sizes(800, 1)),
    "large for nothing": _meta(sizes=sizes(1 << 40, 1 << 20), strides=sizes(0, 0)),
    "endless": _meta(sizes=sizes((1 << 62) - 1, (1 << 62) - 1), strides=sizes(0, 0)),
    "negative": _meta(sizes=sizes(-8, 8)),
    "of negative strides": _meta(strides=sizes(-8, 1)),
    "behind its record": _meta(storage_offset={"as_int": 1 << 40}),
    "of other sizes": _meta(sizes=sizes(4, 8)),
    "of another dtype": _meta(dtype=1),
    "of no dtype": _meta(dtype=99),
    "sparse": _meta(layout=1),
    "on another machine": _meta(device={"type": "cuda", "index": 63}),
    "of a formula": _meta(sizes=[{"as_expr": {"expr_str": "Integer(8)", "hint": None}}] * 2),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_cannot_be(saved, tmp_path, name):
    refused(rewritten(saved, tmp_path / "evil.pt2", **TENSORS[name](records_in(saved))))


def _scales(value):
    def edit(records):
        weights = json.loads(records[WEIGHTS])["config"]
        record = next(entry["path_name"] for path, entry in weights.items() if path.endswith("weight_scale"))
        count = len(records[f"data/weights/{record}"]) // 4
        return {f"data/weights/{record}": struct.pack(f"<{count}f", *[1.0] * (count - 1), value)}

    return edit


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_none(saved, tmp_path, value):
    refused(
        rewritten(saved, tmp_path / "evil.pt2", **_scales(value)(records_in(saved))), "parameters that no quantization"
    )


@pytest.mark.parametrize(("operand", "value"), [("quant_min", 500), ("quant_max", -500), ("quant_max", 1 << 40)])
def test_integer_ranges_that_are_none(saved, tmp_path, operand, value):
    def edit(program):
        for node in top(program)["nodes"]:
            for entry in node["inputs"]:
                if entry["name"] == operand and "dequantize" in node["target"]:
                    entry["arg"] = {"as_int": value}

    refused(rewritten(saved, tmp_path / "evil.pt2", edit), "parameters that no quantization")


@pytest.mark.parametrize(
    "versions",
    [
        {"schema_version": {"major": 9, "minor": 0}},
        {"schema_version": {"major": 8, "minor": 99}},
        {"schema_version": {"major": 8, "minor": -1}},
        {"opset_version": {"aten": 99}},
        {"opset_version": {}},
        {"opset_version": {"aten": 10, "evil": 1}},
        {"verifiers": ["EDGE"]},
        {"verifiers": []},
        {"something": 1},
    ],
)
def test_versions_that_are_not_read(saved, tmp_path, versions):
    refused(rewritten(saved, tmp_path / "evil.pt2", lambda program: program.update(versions)))


def test_many_rows_of_two_bytes(saved, tmp_path):
    record = json.loads(records_in(saved)["extra/quant2e.json"])
    rows = {key: {"values": [0], "index": [0] * 100_000} for key in record["report"]["verdicts"]}
    record["report"]["verdicts"] = rows
    parts = {"extra/quant2e.json": json.dumps(record).encode()}
    refused(rewritten(saved, tmp_path / "evil.pt2", **parts), "the graph is smaller than that")


def test_many_modules_of_a_short_path(saved, tmp_path):
    long = ".".join(["a"] * 60)
    edits = {f"{long}.{old}": old for old in ("first.bias", "second.bias", "calls")}
    records = records_in(saved)
    weights = records[WEIGHTS].decode()
    program = records[MODEL].decode()
    for new, old in edits.items():
        weights, program = (text.replace(json.dumps(old), json.dumps(new)) for text in (weights, program))
    path = rewritten(saved, tmp_path / "deep.pt2", **{WEIGHTS: weights.encode(), MODEL: program.encode()})
    assert load(path).module.get_parameter(f"{long}.first.bias").shape == (8,)
    program, weights = (text.replace(long, ".".join(["a"] * 70)) for text in (program, weights))
    refused(rewritten(saved, tmp_path / "deep.pt2", **{WEIGHTS: weights.encode(), MODEL: program.encode()}))


# ------------------------------------------------------------------------------------------- little text, much to do


def _symbols(letter, count):
    kind = "positive=True, integer=True" if letter == "s" else "integer=True"
    return [f"Symbol('{letter}{index}', {kind})" for index in range(count)]


def _sum(letter, count):
    return f"Add({', '.join(_symbols(letter, count))})"


FORMULAS = {
    "a power of a sum": f"PowByNatural({_sum('u', 10)}, Integer(6))",
    "a product of sums": f"Mul({', '.join([_sum('u', 10)] * 4)})",
    "a power of a power": f"Pow(Pow({_sum('s', 4)}, Integer(4)), Integer(4))",
    "a quotient of powers": f"FloorDiv(Pow({_sum('s', 8)}, Integer(8)), Pow({_sum('s', 7)}, Integer(8)))",
    "a maximum of maxima": "Max(" + ", ".join([f"Max({', '.join(_symbols('s', 12))})"] * 4) + ")",
    "a maximum of many": "Max(" + ", ".join(_symbols("s", 50)) + ")",
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_that_grow_when_they_are_multiplied_out(saved, tmp_path, name):
    def edit(program):
        values = top(program)["tensor_values"]
        values["linear"]["sizes"][0] = {"as_expr": {"expr_str": FORMULAS[name], "hint": {"as_int": 3}}}

    refused(rewritten(saved, tmp_path / "evil.pt2", edit), "not a plain shape formula")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{" + ",".join(f'"k{index}":0' for index in [*range(40_000), 39_999]) + "}", "'k39999' stands twice"),
        ("[" + ",".join(["[]"] * 200_000) + "]", "with next to nothing in them"),
        ("[" + ",".join(["{}"] * 200_000) + "]", "with next to nothing in them"),
    ],
    ids=["a key twice", "lists", "objects"],
)
def test_records_that_cost_more_than_they_hold(saved, tmp_path, text, message):
    refused(rewritten(saved, tmp_path / "evil.pt2", **{"extra/quant2e.json": text.encode()}), message)


def test_a_pickle_of_nothing_many_times_over(saved, tmp_path):
    pickled = b"\x80\x02(" + b"]" * 1_000_000 + b"t."
    record = zipped({"data.pkl": pickled})
    refused(rewritten(saved, tmp_path / "evil.pt2", **{"data/sample_inputs/model.pt": record}), "too many")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_does_not_keep_its_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt2")
    refused(tmp_path / "pipe.pt2")


@pytest.mark.parametrize("size", [1 << 40, 1 << 61, (1 << 63) - 1])
def test_empty_tensors_of_huge_sizes(saved, tmp_path, size):
    sizes = [{"as_int": number} for number in (size, size, 0)]
    edit = _meta(sizes=sizes, strides=[{"as_int": 0}] * 3)(records_in(saved))
    refused(rewritten(saved, tmp_path / "evil.pt2", **edit))
    record = json.loads(records_in(saved)["extra/quant2e.json"])
    record["example_inputs"][0] = {"dtype": "float32", "shape": [size, size, 0]}
    refused(rewritten(saved, tmp_path / "evil.pt2", **{"extra/quant2e.json": json.dumps(record).encode()}), "shape")


def test_no_bit_of_the_directory_is_without_meaning(saved):
    data = saved.read_bytes()
    for place in range(data.index(b"PK\1\2"), len(data)):
        for bit in range(8):
            flipped = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
            with pytest.raises(FileFormatError):
                check_manifest(records_of(flipped))


def test_no_op_that_is_read_writes_into_an_operand_for_results():
    ops, read = Ops(), 0
    for registered in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = registered.partition("::")
        name, _, overload = rest.partition(".")
        if namespace not in ("aten", "prims"):
            continue
        try:
            op = ops.find(f"torch.ops.{namespace}.{name}.{overload or 'default'}")
        except FileFormatError:
            continue
        read += 1
        assert not any(argument.is_out for argument in op._schema.arguments), registered
    assert read > 1000


def test_operands_of_a_dequantize_may_be_spelled_by_name(saved, tmp_path):
    """Rules read operands by their names; a file may spell each by name or by place, as torch does."""

    def edit(program):
        found = next(node for node in top(program)["nodes"] if "dequantize_per_channel" in node["target"])
        for entry in found["inputs"]:
            if entry["name"] in ("quant_min", "quant_max", "dtype"):
                entry["kind"] = 2

    named = rewritten(saved, tmp_path / "named.pt2", edit)
    x, bias = torch.randn(3, 8), torch.randn(8)
    expected, found = (load(path)(x, "fast", extra={"bias": [bias]}) for path in (saved, named))
    assert torch.equal(found["y"], expected["y"])
