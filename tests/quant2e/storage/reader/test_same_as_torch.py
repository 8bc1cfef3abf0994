"""Programs of every kind: the strict reader builds what torch's own loader builds, node by node, and it computes the
same.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from quant2e.graph.captured.capture import as_graph_module
from quant2e.graph.printer import graph_text
from quant2e.quantized_model import load, load_trusted_program

D = Dim.AUTO


def of(function, *parts, **buffers):
    """A module with that forward; ``parts``: submodules ``m0``, ``m1``, …."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for index, part in enumerate(parts):
                self.add_module(f"m{index}", part)
            for name, value in buffers.items():
                self.register_buffer(name, value, persistent=not name.startswith("temporary"))

        forward = function

    return Model().eval()


def rand(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


def tied():
    model = of(lambda self, x: self.m1(self.m0(x).relu()), nn.Linear(4, 4), nn.Linear(4, 4))
    model.m1.weight = model.m0.weight
    return model


def constants():
    model = of(lambda self, x: x * self.plain + torch.tensor([1.0, 2.0]) + self.held.t()[0])
    model.plain, model.held = torch.ones(2), nn.Parameter(rand(3, 2).t())
    return model


def counting(self, x):
    self.calls.add_(1)
    self.temporary.mul_(0.5).add_(x.mean(0))
    return x + self.calls + self.temporary


def looping(self, x):
    def running(i, x):
        return i < 3

    def step(i, x):
        return i + 1, torch.sin(x) * self.m0.weight[0, 0]

    return torch._higher_order_ops.while_loop(running, step, (torch.tensor(0), x))


def branching(self, x):
    return torch.cond(x.sum() > 0, lambda x: (x + 1, x.sum(0)), lambda x: (self.m0(x), x.mean(0)), (x,))


def frozen(self, x):
    with torch.no_grad():
        y = self.m0(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = self.m0(y)
    return z + x


def found(self, x):
    places = torch.nonzero(x > 0)
    count = (x > 0).sum().item()
    torch._check(count >= 0)
    return places, torch.zeros(count)


def shapes(self, x, y):
    n = x.shape[0] * 2 + y.shape[1] // 2
    return x.reshape(-1)[: max(n, 3) - 3], torch.cat([x, x]), x.new_zeros(min(n, 8), x.shape[0] % 3 + 1), y.shape[0]


def mixed(self, x, pair, *, table, flag, name, gain=None):
    return OrderedDict(a=x * pair[0]["w"] + table["k"][1], b=[x.sum(), None], c=(pair[1], flag))


def multiple(self, x):
    values, places = torch.topk(x, 2)
    first, _, third = torch.split(x, [1, 1, 2], dim=-1)
    chunks = x.chunk(2, -1)
    picked = x[:, torch.tensor([0, 2])]
    padded = F.pad(x, (1, 1), mode="replicate")
    return values, places, first + third, chunks[1], picked, padded, torch.einsum("ij,kj->ik", x, x), x.unbind(0)[1]


def varied(self, x):
    y = x.to(torch.float64).to(memory_format=torch.contiguous_format)
    y = F.interpolate(y, scale_factor=2.0, mode="bilinear")
    y = F.gelu(y, approximate="tanh").clamp(-0.5).masked_fill(y > 1e30, float("-inf"))
    z = torch.arange(0, 4, dtype=torch.int16) + torch.full((4,), 3, dtype=torch.int16)
    return y.mean((2, 3)), z, torch.view_as_complex(torch.zeros(2, 2)) * (1 + 2j), torch.zeros(0, 3), x.bfloat16()


N = Dim("n", min=3, max=40)
CASES = {
    "linear": (nn.Linear(3, 4), (rand(2, 3),), {}, None),
    "convolutions": (
        nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)).eval(),
        (rand(4, 3, 9, 9),),
        {},
        ({0: N},),
    ),
    "training": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train(), (rand(5, 3),), {}, None),
    "lstm": (nn.LSTM(3, 4, batch_first=True).eval(), (rand(2, 5, 3),), {}, None),
    "attention": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
        (rand(2, 5, 8),),
        {},
        ({0: D, 1: Dim.AUTO(min=2, max=30)},),
    ),
    "tied weights": (tied(), (rand(2, 4),), {}, None),
    "constants": (constants(), (rand(3, 2),), {}, None),
    "buffers": (of(counting, calls=torch.tensor(0), temporary=torch.zeros(3)), (rand(2, 3),), {}, None),
    "a branch": (of(branching, nn.Linear(3, 3)), (rand(4, 3),), {}, ({0: D},)),
    "a loop": (of(looping, nn.Linear(3, 3)), (rand(4, 3),), {}, None),
    "regions": (of(frozen, nn.Linear(3, 3)), (rand(4, 3),), {}, None),
    "sizes from data": (of(found), (rand(4, 3),), {}, None),
    "formulas of sizes": (of(shapes), (rand(6, 4), rand(5, 8)), {}, ({0: D}, {0: D, 1: D})),
    "equal sizes": (of(lambda self, x, y: x + y), (rand(6, 4), rand(6, 4)), {}, ({0: N}, {0: N})),
    "divisible sizes": (of(lambda self, x: x.reshape(-1, 2, 4)), (rand(6, 4),), {}, ({0: D},)),
    "relations": (of(lambda self, x, y: x[1:] + y), (rand(7, 4), rand(6, 4)), {}, ({0: Dim("m") + 1}, {0: Dim("m")})),
    "structures": (
        of(mixed),
        (rand(2, 3), [{"w": rand(3)}, rand(1)]),
        {"table": {"k": (rand(1), rand(3))}, "flag": True, "name": "fast", "gain": None},
        None,
    ),
    "several results": (of(multiple), (rand(3, 4),), {}, None),
    "kinds of operands": (of(varied), (rand(2, 3, 4, 4),), {}, None),
    "numbers": (of(lambda self, x, a, b, c: x * a + b), (rand(2), 3, 2.5, float("inf")), {}, None),
}


def program(name):
    model, args, kwargs, dynamic = CASES[name]
    return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)


def described(module):
    """Everything that is known about each node of a graph and of the graphs in it."""
    for name, part in module.named_modules():
        for node in getattr(getattr(part, "graph", None), "nodes", ()):
            meta = {
                key: value for key, value in node.meta.items() if key not in ("val", "from_node", "unbacked_bindings")
            }
            values = [
                (type(v), v.shape, v.stride(), v.dtype, v.requires_grad) if isinstance(v, torch.Tensor) else str(v)
                for v in pytree.tree_leaves(node.meta.get("val"))
            ]
            args = str((node.args, node.kwargs)).replace("nan", "")
            yield name, node.op, node.name, str(node.target), args, meta, str(values), "unbacked_bindings" in node.meta


def unbracketed(conditions):
    """Torch leaves out brackets that Python's order of operators does not need."""
    return [text.replace("(", "").replace(")", "") for text in conditions]


def same(ours, theirs):
    ours, theirs = pytree.tree_leaves(ours), pytree.tree_leaves(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("name", CASES)
def test_a_program(name, decomposed, tmp_path):
    exported = program(name)
    if decomposed:
        exported = exported.run_decompositions()
    path = tmp_path / "m.pt2"
    torch.export.save(exported, path)
    ours, theirs = load(path), as_graph_module(torch.export.load(path))
    written_back = re.compile(r"(%copy__default\w*): \w+\[.*?\]")  # torch does not say what these values are
    assert written_back.sub(r"\1", graph_text(ours.module.graph)) == graph_text(theirs.graph)
    for a, b in zip(described(ours.module), described(theirs), strict=True):
        if b[1] != "output" and b[3] != "aten.copy_.default":  # torch leaves the values of these two as they were
            assert a == b
    assert ours.module.inputs.names == theirs.inputs.names
    assert ours.module.inputs.spec == theirs.inputs.spec
    assert unbracketed(ours.module.inputs.conditions) == unbracketed(theirs.inputs.conditions)
    assert ours.module.code == theirs.code
    assert ours.module.training == theirs.training
    assert [n for n, _ in ours.module.named_modules()] == [n for n, _ in theirs.named_modules()]
    for a, b in zip(ours.module.named_buffers(), theirs.named_buffers(), strict=True):
        assert a[0] == b[0]
        assert a[1].stride() == b[1].stride()
        same(a[1], b[1])
    assert list(ours.module.state_dict()) == list(theirs.state_dict())
    assert [(n, p.requires_grad) for n, p in ours.module.named_parameters()] == [
        (n, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    _, args, kwargs, _ = CASES[name]
    torch.manual_seed(1)
    expected = theirs(*args, **kwargs)
    torch.manual_seed(1)
    same(ours.module(*args, **kwargs), expected)
    same(ours.example_inputs, args)
    same(ours.example_kwargs, kwargs)
    assert load_trusted_program(path).module.code == theirs.code


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_a_named_tuple_and_an_op_of_a_library(tmp_path):
    pytree._register_namedtuple(Point, serialized_type_name="quant2e_tests.Point")
    with torch.library._scoped_library("quant2e_test_library", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        torch.library.register_fake("quant2e_test_library::twice", torch.empty_like, lib=library)
        model = of(lambda self, x: Point(torch.ops.quant2e_test_library.twice(x), x))
        torch.export.save(torch.export.export(model, (rand(2),)), tmp_path / "m.pt2")
        found = load(tmp_path / "m.pt2").module(rand(2))
        assert type(found) is Point
        assert torch.equal(found.x, rand(2) * 2)


class Range:
    """A container that writes about itself what it likes."""

    def __init__(self, value, unit):
        self.value, self.unit = value, unit


def test_a_container_with_its_own_way_of_writing(tmp_path):
    pytree.register_pytree_node(
        Range,
        lambda found: ([found.value], found.unit),
        lambda children, unit: Range(*children, unit),
        serialized_type_name="quant2e_tests.Range",
        to_dumpable_context=lambda unit: {"unit": unit},
        from_dumpable_context=lambda data: data["unit"],
    )
    model = of(lambda self, x: Range(x * 2, "m"))
    torch.export.save(torch.export.export(model, (rand(2),)), tmp_path / "m.pt2")
    found = load(tmp_path / "m.pt2").module(rand(2))
    assert found.unit == "m"
    assert torch.equal(found.value, rand(2) * 2)
