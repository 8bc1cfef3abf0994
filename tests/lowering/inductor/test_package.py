"""Packages for AOTInductor: loaded by a process that imports only torch, and equal to the program and to the graph."""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import lowering.inductor.package
from lowering import InductorPackage, check_file, package_inductor, to_inductor
from lowering.inductor.compile import _check_files
from quant2e.errors import FileFormatError, LoweringError
from tests.lowering.graphs import Cnn, Weight, on_dynamic_grid

F = torch.nn.functional

LOADS = """
import sys, torch
from torch._inductor import aoti_load_package

folder = sys.argv[1]
loaded = aoti_load_package(f"{folder}/model.pt2")
calls = torch.load(f"{folder}/calls.pt", weights_only=True)
torch.save([loaded(image, 3, shift=shift) for image, shift in calls], f"{folder}/outputs.pt")
image, shift = calls[1]
for wrong in (image.to(memory_format=torch.channels_last), image[:, :, 1:], image.double(), image.repeat(13, 1, 1, 1)):
    try:
        loaded(wrong, 3, shift=shift)
    except RuntimeError:
        continue
    raise SystemExit(f"ran on {wrong.dtype} {list(wrong.shape)} {wrong.stride()}")
foreign = [name for name in sys.modules if name.split(".")[0] in ("quant2e", "quantizers", "lowering", "torchao")]
assert not foreign, foreign
"""


def capture(module, args, kwargs=None, **options):
    return torch.export.export(module.eval(), args, kwargs, strict=False, **options).module()


class Model(nn.Module):
    """Static and dynamic quantization, a keyword input, a number that is fixed, and outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.cnn, self.w = Cnn(), Weight(torch.randn(16, 5))

    def forward(self, image, factor, *, shift):
        features = self.cnn(image)
        return {"features": features, "more": [F.relu(F.linear(on_dynamic_grid(features), self.w())) * factor + shift]}


@pytest.mark.inductor
@pytest.mark.slow
def test_a_process_without_our_code_runs_the_same_int8_program(tmp_path):
    image, shift = torch.randn(2, 3, 16, 16), torch.randn(16)
    batch = {"image": {0: torch.export.Dim("batch", min=1, max=64)}, "factor": None, "shift": None}
    graph = capture(Model(), (image, 3), {"shift": shift}, dynamic_shapes=batch)
    model = SimpleNamespace(module=graph, example_inputs=(image, 3), example_kwargs={"shift": shift})
    package = package_inductor(model, path=tmp_path / "model.pt2", engines="onednn")
    calls = [(torch.randn(size, 3, 16, 16), torch.randn(16)) for size in (1, 5, 64)]
    torch.save(calls, tmp_path / "calls.pt")
    command = [sys.executable, "-c", LOADS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    outputs = torch.load(tmp_path / "outputs.pt")

    for (x, y), output in zip(calls, outputs, strict=True):
        assert same(output, package(x, 3, shift=y))
    program = to_inductor(model, engines="onednn", verify=False)
    assert same(outputs[1], program(calls[1][0], 3, shift=calls[1][1]))
    assert str(package.report.ops) == str(program.report.ops)
    assert [op.kernel for op in package.report.int8] == ["onednn.qconv"] * 3 + ["onednn.qlinear"] * 2
    text = generated(package)
    assert text.count("aoti_torch_cpu__qconv") + text.count("aoti_torch_cpu__qlinear") >= 5
    assert package.verification.batches == 4
    assert "(image.shape[0]) = (1,), (64,)" in package.report.notes[-1]
    assert package.report.notes[-2].startswith("input 'factor' is fixed to 3")
    with pytest.raises(LoweringError, match="size is 65"):
        package(torch.randn(65, 3, 16, 16), 3, shift=shift)
    package(image.to(memory_format=torch.channels_last), 3, shift=shift)  # brought into the layout
    program.save(tmp_path / "saved.pt2")
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "saved.pt2"))
    assert same(outputs[2], loaded(calls[2][0], 3, shift=calls[2][1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls.pt", "model.pt2", "outputs.pt", "saved.pt2"]
    content = package.path.read_bytes()
    assert check_file(package.path)
    here = [Path(__file__).parent, Path.cwd(), Path.home(), Path(torch.__file__).parent, tempfile.gettempdir()]
    assert [folder for folder in here if f"{folder}/".encode() in content] == []
    package.path.write_bytes(content.replace(b"aoti_torch_cpu__qconv", b"aoti_torch_cpu__qcomv", 1))
    with pytest.raises(FileFormatError, match="was damaged, or edited"):
        InductorPackage(package.path, package.report, package._signature)(*calls[0][:1], 3, shift=shift)


def same(one, other):
    """Same structure, equal bit for bit."""
    leaves, spec = pytree.tree_flatten(one)
    others, other_spec = pytree.tree_flatten(other)
    return spec == other_spec and all(map(torch.equal, leaves, others))


def generated(package):
    """The C++ in a package."""
    with zipfile.ZipFile(package.path) as archive:
        return "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith("wrapper.cpp"))


# ------------------------------------------------------------------------------------------- without compiling


def fake(monkeypatch, run):
    monkeypatch.setattr(lowering.inductor.package, "package_flat", lambda *_: b"new")
    monkeypatch.setattr(lowering.inductor.package, "finished", lambda content, record: content)
    monkeypatch.setattr(lowering.inductor.package, "load_package", lambda path: run)


def test_a_package_that_computes_something_else_does_not_appear(tmp_path, monkeypatch):
    model, x, path = capture(nn.Linear(4, 4), (torch.randn(2, 4),)), torch.randn(2, 4), tmp_path / "model.pt2"
    path.write_bytes(b"old")
    fake(monkeypatch, lambda x: model(x) * 2)
    with pytest.raises(LoweringError, match="the package does not compute what its Q/DQ graph says"):
        package_inductor(model, (x,), path=path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]
    package = package_inductor(model, (x,), path=path, verify=False)
    assert (package.path, package.verification, path.read_bytes()) == (path, None, b"new")
    fake(monkeypatch, model)
    assert package_inductor(model, (x,), path=path).verification.sqnr_db == float("inf")


def test_a_package_is_copied_and_further_inputs_are_compared(tmp_path, monkeypatch):
    model, x = capture(nn.Linear(4, 4), (torch.randn(2, 4),)), torch.randn(2, 4)
    fake(monkeypatch, model)
    package = package_inductor(model, (x,), path=tmp_path / "model.pt2", verify_inputs=[(x + 1,), (x + 2,)])
    assert package.verification.batches == 4  # the first is run twice
    package.save(tmp_path / "copy.pt2")
    assert (tmp_path / "copy.pt2").read_bytes() == b"new"
    with pytest.raises(LoweringError, match=r"ending in \.pt2, not '.*model'"):
        package.save(tmp_path / "model")


def test_dynamic_sizes_are_compared_at_their_ends(tmp_path, monkeypatch):
    seen = []
    ids, length = torch.tensor([[3, 1, 2], [1, 2, 3]]), torch.export.Dim("length", min=3, max=500)
    shapes = ({0: torch.export.Dim("batch"), 1: length}, {1: length})

    class Pick(nn.Module):
        def forward(self, ids, bias):
            return ids + bias

    model = capture(Pick(), (ids, torch.tensor([[1, 1, 1]])), dynamic_shapes=shapes)
    fake(monkeypatch, lambda ids, bias: (seen.append(ids), ids + bias)[1])
    package_inductor(model, (ids, torch.tensor([[1, 1, 1]])), path=tmp_path / "model.pt2")
    assert list(dict.fromkeys(tuple(x.shape) for x in seen)) == [(2, 3), (1, 3), (1, 500), (64, 3), (64, 500)]
    assert set(torch.cat([x.flatten() for x in seen]).tolist()) == {1, 2, 3}  # what the example holds, repeated


class Out(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@pytest.mark.parametrize(
    ("make", "path", "message"),
    [
        (lambda x: x + 1, "model.pte", "ending in .pt2"),
        (lambda x: (x + 1, None), "model.pt2", "the graph returns None, and packages return tensors only"),
        (lambda x: Pair(x + 1, x + 2), "model.pt2", "takes or returns namedtuple"),
    ],
)
def test_what_a_package_cannot_hold_is_refused(make, path, message, tmp_path):
    x = torch.randn(2, 4)
    with pytest.raises(LoweringError, match=message):
        package_inductor(capture(Out(make), (x,)), (x,), path=tmp_path / path)
    assert list(tmp_path.iterdir()) == []


def test_ops_that_torch_alone_lacks_are_refused(tmp_path):
    nodes = {"nodes": [{"node": {"target": f"torch.ops.{name}"}} for name in ("aten.sin.default", "mine.op.default")]}
    (tmp_path / "a.json").write_text(json.dumps(nodes))
    (tmp_path / "a.cpp").write_text("")
    with pytest.raises(LoweringError, match=r"calls mine\.op\.default, which a process that imports only torch"):
        _check_files([tmp_path / "a.json", tmp_path / "a.cpp"])
